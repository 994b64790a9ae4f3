"""``model.compile``: the decode step through torch.compile says what the plain one says, and is traced a few times only."""

import pytest
import torch
from tiny import save_tiny

import tea_rl.backbone as backbone_module
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, generate

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6]]
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
    monkeypatch.setattr(backbone_module, "COMPILE_BACKEND", backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, plain = written(model, 1)
    assert not torch._dynamo.utils.counters["stats"]
    _, compiled = written(model, 1, compile=True)
    for one, other in zip(plain, compiled, strict=True):
        assert torch.equal(one.tokens.actions, other.tokens.actions)
        torch.testing.assert_close(one.tokens.states, other.tokens.states, rtol=1e-4, atol=1e-4)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_a_failing_compiler_is_one_line(model, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    torch._dynamo.reset()
    monkeypatch.setattr(backbone_module, "COMPILE_BACKEND", broken)
    with pytest.raises(
        TeaError, match=r"model\.compile is true, but torch\.compile fails .*set model\.compile"
    ):
        written(model, 1, compile=True)
