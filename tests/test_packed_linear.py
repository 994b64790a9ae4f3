"""Weights laid out for a CPU's bfloat16 products: the same numbers, the same digest, no gradients."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import save_tiny

import tea_rl.packed_linear as packed_linear
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.head.scratch import Scratch
from tea_rl.packed_linear import PackedGroup, PackedLinear, PackedOutput, can_pack, pack_linear_layers
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.states.keys import body_digest

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def capable(monkeypatch):
    """As on a CPU with bfloat16 instructions; without them the same operators are slow, not wrong."""
    monkeypatch.setattr(packed_linear, "cpu_has_bfloat16", lambda: True)
    if not can_pack(torch.bfloat16):
        pytest.skip("this torch has no such products")
    try:
        layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        PackedLinear(layer, PackedGroup([layer]))(torch.ones(1, 4, dtype=torch.bfloat16))
    except RuntimeError as error:  # a processor without AVX-512
        pytest.skip(f"no such products on this processor: {error}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (3, 5, 40), (300, 40)])
def test_product_is_that_of_the_plain_layer(capable, bias, shape):
    layer = torch.nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = PackedLinear(layer, PackedGroup([layer]))(x)
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
    # Heads and embedding share the output layer's plain weight.
    assert type(packed.reference) is PackedOutput and packed.digest == plain.digest
    if packed.model.config.tie_word_embeddings:
        assert packed.reference.weight is packed.model.get_input_embeddings().weight


class Block(torch.nn.Module):
    """Three layers on one input, one of them only if ``spare``, and one on another."""

    def __init__(self, biases=(True, True, True)):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(12, 40)
        self.reads = torch.nn.ModuleList(
            torch.nn.Linear(40, width, bias) for width, bias in zip((24, 8, 40), biases, strict=True)
        )
        self.last = torch.nn.Linear(40, 16)
        self.spare = torch.nn.Linear(40, 8)

    def forward(self, input_ids, spare=False, use_cache=None):
        x = self.embed(input_ids)
        outs = [read(x) for read in self.reads]
        return [*outs, self.last(outs[2]), self.spare(x) if spare else None]


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_layers_that_read_the_same_input_are_one_product(capable, monkeypatch, biases):
    block = Block(biases).bfloat16().requires_grad_(False)
    expected = [block(ids, spare=True) for ids in (IDS, IDS + 0, IDS.flip(1))]
    pack_linear_layers(block, IDS[:1, :2])
    multiplied = []
    product = PackedGroup._product
    monkeypatch.setattr(PackedGroup, "_product", lambda self, x: multiplied.append(self) or product(self, x))
    for ids, outs in zip((IDS, IDS + 0, IDS.flip(1)), expected, strict=True):
        for found, out in zip(block(ids, spare=True), outs, strict=True):
            torch.testing.assert_close(found, out)
    # What was not asked while they were looked at is alone, and so is what has no bias where the others have one.
    assert len(multiplied) == 3 * (4 if len(set(biases)) == 2 else 3)
    assert not any(group._shared is not None and group._shared._known is not None for group in multiplied)


def test_what_was_asked_once_is_not_the_answer_to_something_else(capable):
    """A sibling that is left out, or an input that is changed in place, must not leave an old product behind."""
    block = Block().bfloat16().requires_grad_(False)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = [read(x) for read in block.reads] + [read(2 * x) for read in block.reads]
    pack_linear_layers(block, IDS)
    torch.testing.assert_close(block.reads[0](x), plain[0])
    x.mul_(2)
    torch.testing.assert_close(block.reads[1](x), plain[4])
    torch.testing.assert_close(block.reads[2](x / 2), plain[2])
    torch.testing.assert_close(block.reads[2](x), plain[5])


def test_threads_that_share_a_model_get_their_own_products(capable):
    block = Block().bfloat16().requires_grad_(False)
    inputs = torch.randn(8, 300, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = [[read(x) for read in block.reads] for x in inputs]
    pack_linear_layers(block, IDS)

    def ask(number):
        return all(
            torch.equal(read(inputs[number]), expected)
            for _ in range(50)
            for read, expected in zip(block.reads, plain[number], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(8)))


def test_a_changed_output_weight_is_the_one_that_counts(capable):
    layer = torch.nn.Linear(40, 300, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = PackedOutput(layer)
    with torch.no_grad():
        layer.weight[7] = 1.0
    torch.testing.assert_close(packed(x), layer(x))
    packed = PackedOutput(layer)
    packed.load_state_dict({"weight": layer.weight * 2, "bias": layer.bias})
    torch.testing.assert_close(packed.logits(x), layer(x).float())
    packed = PackedOutput(layer).float()
    torch.testing.assert_close(packed(x.float()), layer.float()(x.float()))


def test_a_head_on_a_laid_out_model_is_copied_and_replays(capable, tmp_path):
    """Rollout, replay and a deep copy, on the layers that a CPU with bfloat16 products gets."""
    backbone = load_backbone(str(save_tiny("llama", tmp_path)), "bfloat16", device="cpu")
    assert type(backbone.reference) is PackedOutput
    for size in (24, "all"):
        head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=size))
        torch.nn.init.normal_(head.members.readout, std=0.1)
        head.eval()
        tokens = generate(backbone, head, [[1, 2, 3], [4, 5]], DecodeSettings(4, 6)).tokens
        for own in (head, copy.deepcopy(head)):
            torch.testing.assert_close(own.terms(tokens).logps, tokens.logps, atol=0.02, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 64, 600])
def test_logits_are_those_of_the_plain_output_layer(capable, bias, rows):
    layer = torch.nn.Linear(40, 300, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, scratch = PackedOutput(layer), Scratch()
    for found in (packed(x).float(), packed.logits(x), packed.logits(x, scratch)):
        torch.testing.assert_close(found, layer(x).float())
    assert packed(x).dtype == torch.bfloat16 and packed.logits(x).dtype == torch.float32
    found, expected = (torch.autograd.functional.jacobian(which, x[:1]) for which in (packed, layer))
    torch.testing.assert_close(found, expected)


def test_digest_tells_packed_models_apart(capable, tmp_path):
    folder = str(save_tiny("llama", tmp_path))
    before = load_backbone(folder, "bfloat16", device="cpu")
    other = load_backbone(folder, "bfloat16", device="cpu", plain=True)
    with torch.no_grad():
        other.body.layers[0].mlp.up_proj.weight.mul_(1.5)
    pack_linear_layers(other.body, IDS)
    assert body_digest(before) != body_digest(other)


def test_what_is_not_packed(capable, monkeypatch, tmp_path):
    folder = str(save_tiny("llama", tmp_path))
    for options in (
        {"dtype": "float32"},
        {"dtype": "bfloat16", "quantization": "w8a8"},
    ):
        body = load_backbone(folder, device="cpu", **options).body
        assert not any(isinstance(layer, PackedLinear) for layer in body.modules())
    monkeypatch.setattr(packed_linear, "cpu_has_bfloat16", lambda: False)
    assert not can_pack(torch.bfloat16)
    block = Block().bfloat16().requires_grad_(False)
    block.spare.weight = block.reads[1].weight
    pack_linear_layers(block, IDS)
    assert type(block.spare) is type(block.reads[1]) is torch.nn.Linear
    assert type(block.reads[0]) is type(block.last) is PackedLinear


def test_gradients_and_saving_are_refused(capable, tmp_path):
    model = load_backbone(str(save_tiny("llama", tmp_path)), "bfloat16", device="cpu").model
    layer = next(layer for layer in model.modules() if isinstance(layer, PackedLinear))
    with pytest.raises(TeaError, match="no gradients: load it with .*plain=True"):
        layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16, requires_grad=True))
    with pytest.raises(TeaError, match="cannot be saved: load it with .*plain=True"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
