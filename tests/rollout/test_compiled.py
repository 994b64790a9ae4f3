"""``model.compile`` as GPUs have it, layer by layer: says what the plain step says, and is traced a few times only."""

import pytest
import torch
from tiny import save_tiny, tiny_config

import tea_rl.compiled as compiled_module
from tea_rl.backbone import Backbone, load_backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, generate, sequences

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6]]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(Backbone, "_compiles_layers", property(lambda backbone: backbone.compile))
    monkeypatch.setattr(sequences, "tape_of", lambda _: None)


SETTINGS = DecodeSettings(num_generations=3, max_new_tokens=8, stop=(" ",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def written(model, seed, **loading):
    backbone = load_backbone(str(model), dtype="float32", **loading)
    head = TeaHead.for_backbone(backbone)
    return backbone, [generate(backbone, head, PROMPTS, SETTINGS, (seed, again)) for again in range(3)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_write_the_same(model, monkeypatch, backend):
    """Rows part, end and grow; shapes are symbols, so that none of that is traced anew."""
    monkeypatch.setattr(compiled_module, "COMPILE_BACKEND", backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, plain = written(model, 1)
    assert not torch._dynamo.utils.counters["stats"]
    _, compiled = written(model, 1, compile=True)
    for one, other in zip(plain, compiled, strict=True):
        assert torch.equal(one.tokens.actions, other.tokens.actions)
        torch.testing.assert_close(one.tokens.states, other.tokens.states, rtol=1e-4, atol=1e-4)
    # One code for all layers, and one more for steps without padding.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bloom", "gemma3"])
def test_layers_of_every_family_share_their_code(family, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_module, "COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    types = getattr(tiny_config(family), "layer_types", None)
    kinds = {} if types is None else {"layer_types": (types * 3)[:5]}
    model = save_tiny(family, tmp_path, num_hidden_layers=5, **kinds)
    _, plain = written(model, 1)
    backbone, compiled = written(model, 1, compile=True)
    for one, other in zip(plain, compiled, strict=True):
        assert torch.equal(one.tokens.actions, other.tokens.actions)
        torch.testing.assert_close(one.tokens.states, other.tokens.states, rtol=1e-4, atol=1e-4)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not any("forward" in vars(module) for module in backbone.model.modules())


def test_a_failing_compiler_is_one_line(model, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "COMPILE_BACKEND", broken)
    with pytest.raises(
        TeaError, match=r"model\.compile is true, but torch\.compile fails .*set model\.compile"
    ):
        written(model, 1, compile=True)


def test_a_body_without_layers_is_one_line():
    with pytest.raises(TeaError, match=r"Linear has no list of 3 layers .*set model\.compile to false"):
        compiled_module.CompiledLayers(torch.nn.Linear(2, 2), 3)
