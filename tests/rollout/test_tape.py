"""Layers that are played: the bits of the modules, in every family; and the modules wherever playing could be wrong."""

import gc
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from test_decode import encode, trained_head
from test_shared_prefix import ALIKE, LONG
from tiny import SUPPORTED, save_tiny, tiny_backbone
from transformers.models.llama.modeling_llama import LlamaMLP

from tea_rl.backbone import load_backbone
from tea_rl.head.config import ContextConfig
from tea_rl.rollout import DecodeSettings, generate, sequences, tape
from tea_rl.rollout.cache import cut_row
from tea_rl.rollout.sequences import extend
from tea_rl.rollout.tape import PlayedLayer, tape_of

#: Those whose layers ask our attention for everything, over caches that are written in place.
PLAYED = set(SUPPORTED) - {"bloom", "gemma3"}
PROMPTS = ["One", "Another prompt", "And a third"]
SETTINGS = DecodeSettings(num_generations=5, max_new_tokens=12)


@pytest.fixture
def fresh(tmp_path):
    """A llama that nobody else has."""
    return tiny_backbone(tmp_path, "llama")


def write(backbone, texts=tuple(PROMPTS)):
    return generate(backbone, trained_head(backbone), encode(backbone, list(texts)), SETTINGS).tokens


def played(backbone):
    return tape_of(backbone) is not None


def by_modules(backbone, monkeypatch, *given):
    """The same without the tape."""
    with monkeypatch.context() as patch:
        patch.setattr(sequences, "tape_of", lambda _: None)
        return write(backbone, *given)


@pytest.mark.parametrize("texts", [PROMPTS, LONG, ALIKE], ids=["short", "long", "alike"])
@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_what_is_played_is_what_the_modules_say(backbones, family, texts, monkeypatch):
    backbone = backbones(family)
    modules = by_modules(backbone, monkeypatch, texts)
    tokens = write(backbone, texts)
    assert played(backbone) == (family in PLAYED)
    for name, found in tokens.tensors().items():
        assert torch.equal(found, modules.tensors()[name]), name


def test_modules_are_called_where_no_step_is_played(fresh):
    """By transformers itself, over its own caches, and for several tokens at once."""
    ids = torch.arange(12).view(2, 6)
    before = fresh.model(ids).logits
    written = fresh.model.generate(ids, max_new_tokens=8, do_sample=False)
    calls = []
    write(fresh)
    assert played(fresh)
    hook = fresh.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(fresh.model(ids).logits, before)
    assert torch.equal(fresh.model.generate(ids, max_new_tokens=8, do_sample=False), written)
    hook.remove()
    assert len(calls) == 9


@pytest.mark.parametrize("before", [True, False])
def test_who_listens_to_a_module_hears_every_step(fresh, monkeypatch, before):
    heard = []
    first = by_modules(fresh, monkeypatch) if before else write(fresh)
    mlp = fresh.model.model.layers[1].mlp
    hook = mlp.register_forward_hook(lambda _, given, output: heard.append(len(output)) or 2 * output)
    changed = write(fresh)
    assert not played(fresh) and len(heard) == 12  # the prompts, and eleven steps
    assert torch.equal(changed.states, by_modules(fresh, monkeypatch).states)
    hook.remove()
    assert torch.equal(write(fresh).states, first.states) and played(fresh)


def test_hooks_of_a_layer_hear_steps_that_are_played(fresh):
    first, heard = write(fresh), []
    hook = fresh.model.model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(write(fresh).states, first.states) and played(fresh) and len(heard) == 12
    hook.remove()


def test_who_listens_to_all_modules_hears_every_step(fresh):
    first, heard = write(fresh), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    write(fresh)
    hook.remove()
    assert sum(isinstance(module, LlamaMLP) for module in heard) == 2 * 12
    assert torch.equal(write(fresh).states, first.states) and played(fresh)


def exchange_module(layer):
    layer.mlp.down_proj = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)


def exchange_weight(layer):
    layer.mlp.down_proj.weight = torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)


def change_weight(layer):
    layer.mlp.down_proj.weight.data.mul_(3)


def lay_out_otherwise(layer):
    layer.input_layernorm.weight.data = torch.randn(32, 2)[:, 0]


def put_in_place(layer):
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * forward(x)


def change_number(layer):
    layer.self_attn.scaling *= 2


@pytest.mark.parametrize(
    "change",
    [exchange_module, exchange_weight, change_weight, lay_out_otherwise, put_in_place, change_number],
)
def test_a_changed_layer_is_not_forgotten(fresh, change, monkeypatch):
    first = write(fresh)
    change(fresh.model.model.layers[0])
    second = write(fresh)
    assert not torch.equal(first.states, second.states) and played(fresh)
    assert torch.equal(second.states, by_modules(fresh, monkeypatch).states)


def test_weights_that_were_exchanged_are_let_go(fresh):
    write(fresh)
    old = weakref.ref(fresh.model.model.layers[0].mlp.down_proj.weight)
    exchange_weight(fresh.model.model.layers[0])
    write(fresh)
    gc.collect()
    assert old() is None


def test_one_more_token_is_read_by_the_modules(fresh):
    """Nobody has looked at the layers then."""
    write(fresh)
    rows = [cut_row(prefilled.cache, 0, torch.arange(4), None) for prefilled in [prompt(fresh)]]
    first, _ = extend(fresh, rows, [[4, 5, 6, 7, 8]], ContextConfig())
    exchange_weight(fresh.model.model.layers[0])
    second, _ = extend(fresh, rows, [[4, 5, 6, 7, 8]], ContextConfig())
    assert not torch.equal(first, second)


def prompt(backbone):
    return sequences.prefill(backbone, [[4, 5, 6, 7]], None)


def test_steps_under_autocast_are_not_played(fresh, monkeypatch):
    write(fresh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not played(fresh)
    assert played(fresh)


def test_a_model_in_another_format_is_not_the_one_that_was_recorded(fresh, monkeypatch):
    write(fresh)
    fresh.model.bfloat16()
    second = write(fresh)
    assert second.states.dtype == torch.bfloat16 and played(fresh)
    assert torch.equal(second.states, by_modules(fresh, monkeypatch).states)


def reads_a_number(x):
    return x * x.abs().max().item()


def branches_on_a_number(x):
    return x if bool((x > 0).any()) else -x


def branches_on_rows(x):
    return 2 * x if len(x) == 1 else x


def branches_on_even_rows(x):
    return x if len(x) % 2 else 2 * x


def draws(x):
    return x + torch.rand_like(x)


def makes_a_table(x):
    return x + torch.tensor([0.5])


def chooses(x):
    return x[torch.nonzero(x[:, 0, 0] > -9).squeeze(1)]


@pytest.mark.parametrize(
    "does, refused",
    [
        (reads_a_number, "reads a tensor"),
        (branches_on_a_number, "reads a tensor"),
        (branches_on_rows, "not what the modules say"),
        (branches_on_even_rows, "not what the modules say"),
        (draws, "not what the modules say"),
    ],
)
def test_what_may_differ_from_step_to_step_is_not_played(fresh, monkeypatch, does, refused):
    assert_plays(fresh, monkeypatch, does, False)
    assert refused in fresh.tape.refused
    assert not any("forward" in vars(layer) for layer in fresh.model.model.layers)


@pytest.mark.parametrize("does", [makes_a_table, chooses])
def test_operations_that_make_or_choose_tensors_are_played(fresh, monkeypatch, does):
    assert_plays(fresh, monkeypatch, does, True)


def assert_plays(backbone, monkeypatch, does, plays):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, does(x)))
    torch.manual_seed(0)
    modules = by_modules(backbone, monkeypatch)
    torch.manual_seed(0)
    assert played(backbone) == plays
    torch.manual_seed(0)
    assert torch.equal(write(backbone).states, modules.states)


def test_a_step_that_depends_on_the_length_is_not_played(fresh, monkeypatch):
    layer = type(fresh.model.model.layers[0])
    forward = layer.forward

    def scaled(self, states, *args, past_key_values=None, **kwargs):
        length = past_key_values.get_seq_length() if past_key_values is not None else 0
        return forward(self, states * (length + 1), *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(layer, "forward", scaled)
    modules = by_modules(fresh, monkeypatch)
    assert torch.equal(write(fresh).states, modules.states) and not played(fresh)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_weights_of_its_own(fresh, copied):
    write(fresh)
    twin = copied(fresh.model)
    assert isinstance(vars(twin.model.layers[0])["forward"], PlayedLayer)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        first = fresh.model(ids).logits
        assert torch.equal(twin(ids).logits, first)
        twin.model.layers[0].mlp.down_proj.weight.mul_(5)
        assert not torch.equal(twin(ids).logits, first)
        assert torch.equal(fresh.model(ids).logits, first)


def test_a_copy_of_a_backbone_plays_weights_of_its_own(fresh, monkeypatch):
    first, twin = write(fresh), deepcopy(fresh)
    twin.model.model.layers[0].mlp.down_proj.weight.data.mul_(5)
    second = write(twin)
    assert played(twin) and not torch.equal(second.states, first.states)
    assert torch.equal(second.states, by_modules(twin, monkeypatch).states)
    assert torch.equal(write(fresh).states, first.states)


def test_who_breaks_off_while_layers_are_recorded_leaves_them_as_they_were(fresh, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tape, "program", stop)
        with pytest.raises(KeyboardInterrupt):
            write(fresh)
    assert not any("forward" in vars(layer) for layer in fresh.model.model.layers)
    assert played(fresh)


@pytest.mark.parametrize("loading", [{"dtype": "bfloat16"}, {"dtype": "float32", "quantization": "w8a8"}])
def test_layers_laid_out_for_inference_are_played(tmp_path, monkeypatch, loading):
    backbone = load_backbone(str(save_tiny("llama", tmp_path)), device="cpu", **loading)
    modules = by_modules(backbone, monkeypatch)
    assert torch.equal(write(backbone).states, modules.states) and played(backbone)
