"""Weights laid out for a CPU's bfloat16 products: the same numbers, the same digest, no gradients."""

import pytest
import torch
from tiny import save_tiny

import tea_rl.packed_linear as packed_linear
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.packed_linear import PackedLinear, can_pack, pack_linear_layers
from tea_rl.states.keys import body_digest

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def capable(monkeypatch):
    """As on a CPU with bfloat16 instructions; without them the same operators are slow, not wrong."""
    monkeypatch.setattr(packed_linear, "cpu_has_bfloat16", lambda: True)
    if not can_pack(torch.bfloat16):
        pytest.skip("this torch has no such products")
    try:
        PackedLinear(torch.nn.Linear(4, 4, dtype=torch.bfloat16))(torch.ones(1, 4, dtype=torch.bfloat16))
    except RuntimeError as error:  # a processor without AVX-512
        pytest.skip(f"no such products on this processor: {error}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (3, 5, 40), (300, 40)])
def test_product_is_that_of_the_plain_layer(capable, bias, shape):
    layer = torch.nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = PackedLinear(layer)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_backbone_gives_the_states_and_the_digest_of_the_plain_one(capable, family, tmp_path):
    folder = str(save_tiny(family, tmp_path))
    plain = load_backbone(folder, "bfloat16", device="cpu", plain=True)
    packed = load_backbone(folder, "bfloat16", device="cpu")
    kinds = [{type(layer) for layer in backbone.body.modules()} for backbone in (plain, packed)]
    assert PackedLinear not in kinds[0] and PackedLinear in kinds[1] and torch.nn.Linear not in kinds[1]
    assert plain.model.config._attn_implementation == "sdpa"
    assert body_digest(packed) == body_digest(plain)
    torch.testing.assert_close(packed.forward(IDS), plain.forward(IDS), rtol=0.05, atol=0.05)
    # The output layer stays, for heads share its weight.
    assert type(packed.reference) is torch.nn.Linear


def test_digest_tells_packed_models_apart(capable, tmp_path):
    folder = str(save_tiny("llama", tmp_path))
    before = load_backbone(folder, "bfloat16", device="cpu")
    other = load_backbone(folder, "bfloat16", device="cpu", plain=True)
    with torch.no_grad():
        other.body.layers[0].mlp.up_proj.weight.mul_(1.5)
    pack_linear_layers(other.body)
    assert body_digest(before) != body_digest(other)


def test_what_is_not_packed(capable, monkeypatch, tmp_path):
    folder = str(save_tiny("llama", tmp_path))
    for options in (
        {"dtype": "float32"},
        {"dtype": "bfloat16", "compile": True},
        {"dtype": "bfloat16", "quantization": "w8a8"},
    ):
        body = load_backbone(folder, device="cpu", **options).body
        assert not any(isinstance(layer, PackedLinear) for layer in body.modules())
    monkeypatch.setattr(packed_linear, "cpu_has_bfloat16", lambda: False)
    assert not can_pack(torch.bfloat16)
    twice = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    twice[1].weight = twice[0].weight
    pack_linear_layers(twice.bfloat16().requires_grad_(False))
    assert all(type(layer) is torch.nn.Linear for layer in twice)


def test_gradients_and_saving_are_refused(capable, tmp_path):
    model = load_backbone(str(save_tiny("llama", tmp_path)), "bfloat16", device="cpu").model
    layer = next(layer for layer in model.modules() if isinstance(layer, PackedLinear))
    with pytest.raises(TeaError, match="no gradients: load it with .*plain=True"):
        layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16, requires_grad=True))
    with pytest.raises(TeaError, match="cannot be saved: load it with .*plain=True"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
