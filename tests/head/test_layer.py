"""The TEA head as a drop-in output layer, and its ensemble."""

import json

import pytest
import torch
from naive_policy import logits_of, member_correction
from torch import nn

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.head.members import PackedMembers
from tea_rl.head.scratch import Scratch

HIDDEN, VOCAB = 48, 200


@pytest.fixture
def reference() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)


def perturb(head: TeaHead, scale: float = 0.1) -> TeaHead:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in head.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return head.eval()


CONFIGS = [
    HeadConfig(),
    HeadConfig(num_members=1, hidden_sizes=[8], shortlist_size=5),
    HeadConfig(
        num_members=3, hidden_sizes=[30, 20, 10], random_widths=True, feature_fraction=0.3, shortlist_size=20
    ),
    HeadConfig(shortlist_size="all", aggregation="mean"),
    HeadConfig(train_reference=True, member_dropout=0.5, dropout=0.2),
    HeadConfig(readout="vocab", readout_rank=4, shortlist_size="auto", member_dropout=0.5, hidden_sizes=[16]),
    HeadConfig(
        readout="vocab", member_kind="memory", random_widths=True, hidden_sizes=[30, 20], shortlist_size=9
    ),
    HeadConfig(member_kind="memory", memory_slots=7, hidden_sizes=[12, 8], feature_fraction=0.5),
    HeadConfig(
        context={"layers": [1, -1], "horizons": ["all", 8.0]},
        hidden_sizes=[16],
        feature_fraction=0.5,
        gate=True,
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_fresh_head_is_the_base_model(reference, config):
    """Invariant 1 on logits, also in training mode with every kind of dropout."""
    head = TeaHead(reference, config)
    states = torch.randn(3, 5, head.state_width)
    assert torch.equal(head(states), reference(states[..., :HIDDEN]))
    assert head.disagreement(states).abs().max() == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_strength_zero_is_the_base_model(reference, config):
    """Invariant 6: exactly, whatever was trained."""
    head = perturb(TeaHead(reference, config))
    states = torch.randn(3, 5, head.state_width)
    assert not torch.allclose(head(states), reference(states[..., :HIDDEN]))
    head.strength = 0.0
    assert torch.equal(head(states), reference(states[..., :HIDDEN]))


def test_reference_weight_is_shared_and_frozen(reference):
    head = TeaHead(reference, HeadConfig(train_reference=True))
    assert head.weight is reference.weight
    assert all(parameter is not reference.weight for parameter in head.trainable_parameters())
    head(torch.randn(4, HIDDEN)).sum().backward()
    assert reference.weight.grad is None


def test_half_precision_reference(reference):
    head = perturb(TeaHead(reference.to(torch.bfloat16), HeadConfig(shortlist_size=16)))
    states = torch.randn(6, HIDDEN, dtype=torch.bfloat16)
    shortlist, _ = head.shortlist_of(states)
    full = head(states).log_softmax(-1)
    slots = head.slot_logits(states, shortlist).log_softmax(-1)
    torch.testing.assert_close(full.gather(1, shortlist.ids), slots[:, :-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature_fraction", [1.0, 0.5])
@pytest.mark.parametrize("random_widths", [False, True])
def test_packed_members_equal_a_loop(feature_fraction, random_widths):
    """The packed product against members written one by one."""
    config = HeadConfig(
        num_members=5, hidden_sizes=[40, 16], feature_fraction=feature_fraction, random_widths=random_widths
    )
    members = PackedMembers(config, HIDDEN, seed=3).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in members.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    states = torch.randn(11, HIDDEN)
    blocks = members.readout.chunk(config.num_members, dim=1)
    total = torch.zeros(11, HIDDEN + 1)
    for k in range(config.num_members):
        seen = states if members.feature_index is None else states[:, members.feature_index[k]]
        x = nn.functional.layer_norm(seen, seen.shape[-1:]) * members.norm_scale[k] + members.norm_shift[k]
        start, width = 0, x.shape[1]
        for layer, (weight, bias) in enumerate(zip(members.weights, members.biases, strict=True)):
            own = int(members.widths[k, layer])
            x = nn.functional.silu(x @ weight[k, :width, :own] + bias[k, :, :own])
            total += x @ blocks[k][:, start : start + own].t()
            start, width = start + weight.shape[2], own
    g, shift = members(states)
    torch.testing.assert_close(g, total[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shift, 10 * total[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("readout", ["tied", "vocab"])
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_forward_is_the_mean_of_member_answers(aggregation, readout):
    config = HeadConfig(num_members=6, aggregation=aggregation, readout=readout)
    members = PackedMembers(config, HIDDEN, vocab_size=VOCAB).eval()
    nn.init.normal_(members.readout)
    states = torch.randn(9, HIDDEN)
    each, shifts = members.corrections_per_member(states)
    g, shift = members(states)
    torch.testing.assert_close(each.mean(0), g, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifts.mean(0), shift, rtol=1e-4, atol=1e-3)


def test_member_dropout_keeps_one_and_the_scale():
    members = PackedMembers(HeadConfig(num_members=4, member_dropout=0.9), HIDDEN).train()
    for _ in range(50):
        scales = members._member_scales(torch.device("cpu")).flatten()
        survivors = int((scales > 0).sum())
        assert 1 <= survivors <= 4
        assert scales.sum().item() == pytest.approx(4.0)
    members.eval()
    assert members._member_scales(torch.device("cpu")) == 1.0


def test_random_widths_have_the_stated_mean_and_floor():
    widths = PackedMembers(
        HeadConfig(num_members=2000, hidden_sizes=[60], random_widths=True), 4
    ).widths.float()
    assert widths.min() >= 10
    assert widths.mean().item() == pytest.approx(60, rel=0.06)
    assert widths.std() > 30


def test_disagreement_grows_with_conflicting_members(reference):
    head = TeaHead(reference, HeadConfig(num_members=2, hidden_sizes=[16], shortlist_size=32))
    block = torch.randn(HIDDEN + 1, 16)
    weight = head.members.weights[0].data
    weight[1] = weight[0]
    states = torch.randn(5, HIDDEN)
    head.members.readout.data = torch.cat([block, block], dim=1)
    assert head.disagreement(states).max() < 1e-6
    head.members.readout.data = torch.cat([block, -block], dim=1)
    assert head.disagreement(states).min() > 1e-3


@pytest.mark.parametrize("config", CONFIGS)
def test_disagreement_is_the_variance_of_single_members(reference, config):
    head = perturb(TeaHead(reference, config))
    states = torch.randn(5, head.state_width)
    top = reference(states[:, :HIDDEN]).topk(min(128, head.shortlist_size)).indices
    delta_of_reference = head.reference_delta
    head.reference_delta = None  # it is no member's own
    each = torch.stack([member_correction(head, k, states)[0] for k in range(config.num_members)])
    head.reference_delta = delta_of_reference
    if config.aggregation == "sum":
        each = each * config.num_members
    expected = each.gather(2, top.expand(config.num_members, -1, -1)).var(dim=0, correction=0).mean(-1)
    torch.testing.assert_close(head.disagreement(states), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_full_logits_are_those_of_the_definition(reference, config):
    """The drop-in against members written one by one, for every readout, member kind and shortlist."""
    head = perturb(TeaHead(reference, config, logit_scale=0.7))
    states = torch.randn(6, head.state_width)
    expected, _ = logits_of(head, states)
    torch.testing.assert_close(head(states) * head.logit_scale, expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_a_wide_state_are_normalised_apart():
    """A running mean a thousand times larger than the state changes nothing, and drowns nothing."""
    config = HeadConfig(context={"layers": [2]}, hidden_sizes=[16])
    members = PackedMembers(config, HIDDEN).eval()
    states = torch.randn(4, 2 * HIDDEN)
    scaled = torch.cat([states[:, :HIDDEN], 1000 * states[:, HIDDEN:]], dim=1)
    torch.testing.assert_close(members.features(scaled), members.features(states), rtol=1e-3, atol=1e-4)
    other = torch.cat([torch.randn(4, HIDDEN), states[:, HIDDEN:]], dim=1)
    assert (members.features(other) - members.features(states)).abs().max() > 0.1


def test_a_head_with_context_needs_the_means(reference):
    head = TeaHead(reference, HeadConfig(context={"layers": [-1]}))
    with pytest.raises(TeaError, match=r"reads 96 numbers.*got 48.*wrapped model"):
        head(torch.randn(2, HIDDEN))


def test_refuses_what_it_cannot_correct(reference):
    with pytest.raises(TeaError, match="shortlist_size 200"):
        TeaHead(reference, HeadConfig(shortlist_size=VOCAB))
    with pytest.raises(TeaError, match="plain"):
        TeaHead(nn.Identity())


class BackboneOf:
    """What a saved head needs to know of a backbone."""

    def __init__(self, reference: nn.Linear, digest: str = "d" * 64):
        self.reference, self.digest, self.name_or_path, self.logit_scale = (
            reference,
            digest,
            "some/model",
            1.0,
        )
        self.vocab_size, self.hidden_size = reference.weight.shape
        self.settings = {"dtype": "float32", "quantization": "none", "revision": None}
        self.compile = False


@pytest.mark.parametrize("config", CONFIGS)
def test_save_and_load(reference, tmp_path, config):
    backbone = BackboneOf(reference)
    head = perturb(TeaHead.for_backbone(backbone, config, seed=5))
    head.strength = 0.5
    head.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tea_config.json",
        "tea_head.safetensors",
        "README.md",
    }
    loaded = TeaHead.from_pretrained(tmp_path, backbone)
    states = torch.randn(7, head.state_width)
    assert torch.equal(loaded(states), head(states))
    assert loaded.strength == 0.5 and loaded.config == config


def test_wrong_base_model_is_refused(reference, tmp_path):
    TeaHead.for_backbone(BackboneOf(reference)).save_pretrained(tmp_path)
    with pytest.raises(TeaError, match="reference digest"):
        TeaHead.from_pretrained(tmp_path, BackboneOf(reference, digest="e" * 64))
    with pytest.raises(TeaError, match="hidden size 48"):
        TeaHead.from_pretrained(tmp_path, BackboneOf(nn.Linear(8, VOCAB)))


def test_damaged_heads_are_named(reference, tmp_path):
    backbone = BackboneOf(reference)
    with pytest.raises(TeaError, match="no such folder"):
        TeaHead.from_pretrained(tmp_path / "absent", backbone)
    with pytest.raises(TeaError, match=r"no tea_config\.json"):
        TeaHead.from_pretrained(tmp_path, backbone)
    TeaHead.for_backbone(backbone).save_pretrained(tmp_path)
    weights = tmp_path / "tea_head.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TeaError, match=r"tea_head\.safetensors"):
        TeaHead.from_pretrained(tmp_path, backbone)
    weights.unlink()
    with pytest.raises(TeaError, match=r"tea_head\.safetensors"):
        TeaHead.from_pretrained(tmp_path, backbone)
    config = json.loads((tmp_path / "tea_config.json").read_text())
    config["head"]["num_members"] = "many"
    (tmp_path / "tea_config.json").write_text(json.dumps(config))
    with pytest.raises(TeaError, match=r"tea_config\.json"):
        TeaHead.from_pretrained(tmp_path, backbone)


def test_a_head_that_is_not_finite_is_not_saved(reference, tmp_path):
    head = TeaHead.for_backbone(BackboneOf(reference))
    head.members.readout.data[0, 0] = torch.nan
    with pytest.raises(TeaError, match="not finite"):
        head.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize("config", CONFIGS)
def test_products_in_bfloat16_are_those_of_float32_up_to_rounding(config):
    torch.manual_seed(3)
    members = PackedMembers(config, HIDDEN, seed=1, vocab_size=VOCAB)
    for parameter in members.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states = torch.randn(20, HIDDEN * (1 + config.context.num_means)).bfloat16()
    members.eval()
    exact, exact_shift = members(states)
    members.product_dtype = torch.bfloat16
    found, shift = members(states)
    assert found.dtype == shift.dtype == members.features(states).dtype == torch.float32
    assert 0 < (found - exact).norm() < 0.03 * exact.norm()
    assert 0 < (shift - exact_shift).norm() < 0.03 * exact_shift.norm()
    alone, _ = members.corrections_per_member(states)
    torch.testing.assert_close(alone.mean(dim=0), found, rtol=0.05, atol=0.05 * found.abs().max().item())
    with torch.no_grad():  # what a rollout records is what an update starts from
        assert (members(states[:10])[0] - found[:10]).norm() < 0.01 * found[:10].norm()
        # Few states are not worth rounding the weights.
        torch.testing.assert_close(members(states[:3])[0], exact[:3], rtol=1e-4, atol=1e-4)


def test_gradients_of_bfloat16_products_are_float32_and_point_the_same_way():
    members = PackedMembers(HeadConfig(hidden_sizes=[32, 16]), HIDDEN, seed=1)
    torch.nn.init.normal_(members.readout, std=0.1)
    states, gradients = torch.randn(50, HIDDEN), []
    for dtype in (torch.float32, torch.bfloat16):
        members.product_dtype = dtype
        members.zero_grad(set_to_none=True)
        g, shift = members(states)
        (g.square().mean() + shift.square().mean()).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in members.parameters())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in members.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


@pytest.mark.parametrize("bias", [True, False])
def test_wide_logits_in_half_precision_are_those_of_one_product(bias, monkeypatch):
    reference = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = TeaHead(reference).eval()
    wanted = reference(states).float()
    monkeypatch.setattr("tea_rl.head.logits._VOCABULARY_BLOCK", 64)
    with torch.no_grad():
        found = head(states)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
        scratch = Scratch()
        kept = head.reference_logits(states.flatten(0, 1), 0.5, scratch)
        assert torch.equal(kept, 2 * wanted.flatten(0, 1))
        again = head.reference_logits(states[0], 1.0, scratch)
        assert again.data_ptr() == kept.data_ptr() and torch.equal(again, wanted[0])
