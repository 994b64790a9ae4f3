"""Layers that are played: the bits of the modules, in every family; and the modules wherever playing could be wrong."""

from copy import deepcopy

import pytest
import torch
from test_decode import encode, trained_head
from test_shared_prefix import ALIKE, LONG
from tiny import SUPPORTED, tiny_backbone
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

from tea_rl.rollout import DecodeSettings, generate, sequences
from tea_rl.rollout.cache import preallocate
from tea_rl.rollout.tape import PlayedLayer, play_layers

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
    return backbone.tape is not None and all(player.play for player in backbone.tape.players)


def by_modules(backbone, monkeypatch, *given):
    """The same without the tape."""
    with monkeypatch.context() as patch:
        patch.setattr(sequences, "play_layers", lambda _: None)
        players = [] if backbone.tape is None else backbone.tape.players
        for player in players:
            player.play = None
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


def test_who_listens_to_a_module_hears_every_step(fresh, monkeypatch):
    first, heard = write(fresh), []
    mlp = fresh.model.model.layers[1].mlp
    hook = mlp.register_forward_hook(lambda _, given, output: heard.append(len(output)) or 2 * output)
    changed = write(fresh)
    assert not played(fresh) and len(heard) == 12  # the prompts, and eleven steps
    assert torch.equal(changed.states, by_modules(fresh, monkeypatch).states)
    hook.remove()
    assert torch.equal(write(fresh).states, first.states) and played(fresh)


def exchange_module(layer):
    layer.mlp.down_proj = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)


def exchange_weight(layer):
    layer.mlp.down_proj.weight = torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)


def change_weight(layer):
    layer.mlp.down_proj.weight.data.mul_(3)


@pytest.mark.parametrize("change", [exchange_module, exchange_weight, change_weight])
def test_a_changed_layer_is_not_forgotten(fresh, change, monkeypatch):
    first = write(fresh)
    change(fresh.model.model.layers[0])
    second = write(fresh)
    assert not torch.equal(first.states, second.states)
    assert torch.equal(second.states, by_modules(fresh, monkeypatch).states)


def reads_a_number(x):
    return x * x.abs().max().item()


def branches_on_a_number(x):
    return x if bool((x > 0).any()) else -x


def branches_on_rows(x):
    return 2 * x if len(x) == 1 else x


def draws(x):
    return x + torch.rand_like(x)


def makes_a_table(x):
    return x + torch.tensor([0.5])


def chooses(x):
    return x[torch.nonzero(x[:, 0, 0] > -9).squeeze(1)]


@pytest.mark.parametrize("does", [reads_a_number, branches_on_a_number, branches_on_rows, draws])
def test_what_may_differ_from_step_to_step_is_not_played(fresh, monkeypatch, does):
    assert_plays(fresh, monkeypatch, does, False)
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
    play_layers(backbone)
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


def test_a_copy_of_a_model_has_weights_of_its_own(fresh):
    ids, mask, positions = torch.arange(10).view(2, 5), torch.ones(2, 5).long(), torch.arange(5).expand(2, 5)
    write(fresh)

    def newest(model):
        cache = DynamicCache(config=model.config)
        model.model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
        preallocate(cache, 5)
        given = {"attention_mask": mask, "position_ids": positions[:, 4:], "past_key_values": cache}
        return model.model(ids[:, 4:], **given).last_hidden_state

    with torch.no_grad():
        same, twin = newest(fresh.model), deepcopy(fresh.model)
        assert torch.equal(newest(twin), same)
        twin.model.layers[0].mlp.down_proj.weight.mul_(5)
        assert not torch.equal(newest(twin), same)
        assert torch.equal(newest(fresh.model), same)
    assert isinstance(vars(fresh.model.model.layers[0])["forward"], PlayedLayer)
