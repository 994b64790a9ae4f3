"""Invariant 3: the shortlist policy equals a naive full-vocabulary computation, values and gradients."""

import pytest
import torch
from naive_policy import HIDDEN, TOKENS, VOCAB, make_head, naive_terms

from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import build_shortlist, compiled_product, largest, sample_slots, shortlist_product

#: Amounts that rows are weighted by are rounded.
BFLOAT16 = {"rtol": 0.02, "atol": 0.02}


def slots_of(shortlist, tail_probs, actions):
    """Slot and within-tail log-probability of given actions."""
    hit = shortlist.ids == actions.unsqueeze(1)
    slots = torch.where(hit.any(1), hit.int().argmax(1), shortlist.ids.shape[1])
    within = torch.where(hit.any(1), 0.0, tail_probs.gather(1, actions.unsqueeze(1)).squeeze(1).log())
    return slots, within


@pytest.mark.parametrize("anchor", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize(
    ("config", "temperature", "strength", "logit_scale"),
    [
        ({"shortlist_size": 16}, 1.0, 1.0, 1.0),
        ({"shortlist_size": 16}, 0.7, 0.5, 1.0),
        ({"shortlist_size": 1, "bias": True}, 1.0, 1.0, 0.3),
        ({"shortlist_size": VOCAB - 1}, 1.3, 1.0, 1.0),
        ({"shortlist_size": 16, "train_reference": True, "feature_fraction": 0.5}, 1.0, 1.0, 2.0),
        ({"shortlist_size": 16, "random_widths": True, "aggregation": "mean"}, 1.0, 2.0, 1.0),
        ({"shortlist_size": 16, "readout": "vocab", "feature_fraction": 0.5}, 0.9, 1.0, 1.0),
        ({"shortlist_size": 16, "readout": "vocab", "train_reference": True}, 1.0, 0.5, 1.5),
        ({"shortlist_size": 16, "member_kind": "memory", "random_widths": True}, 1.0, 1.0, 1.0),
        (
            {"shortlist_size": 16, "member_kind": "memory", "readout": "vocab", "aggregation": "mean"},
            1.0,
            1.0,
            1.0,
        ),
    ],
)
def test_shortlist_equals_full_vocabulary(config, temperature, strength, logit_scale, anchor):
    head = make_head(logit_scale, **config)
    head.strength = strength
    states = torch.randn(TOKENS, HIDDEN)
    actions = torch.randint(VOCAB, (TOKENS,))
    shortlist, tail_probs = head.shortlist_of(states, temperature)
    slots, within = slots_of(shortlist, tail_probs, actions)
    assert (
        slots == shortlist.ids.shape[1]
    ).any() or head.config.shortlist_size == VOCAB - 1  # some actions in the tail

    terms = head.shortlist_terms(states, shortlist, slots, within, temperature, anchor)
    expected = naive_terms(head, states, actions, temperature)
    logps, kl, entropy, penalty = (expected[name] for name in ("logps", "reverse_kl", "entropy", anchor))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(terms.logps, logps, **close)
    torch.testing.assert_close(terms.kl, kl, **close)
    torch.testing.assert_close(terms.anchor, penalty, **close)
    torch.testing.assert_close(terms.entropy, entropy, **close)

    weights = torch.randn(3, TOKENS)
    ours = sum(
        (w * t).mean() for w, t in zip(weights, (terms.logps, terms.anchor, terms.entropy), strict=True)
    )
    theirs = sum((w * t).mean() for w, t in zip(weights, (logps, penalty, entropy), strict=True))
    parameters = head.trainable_parameters()
    # rows of vocab_readout and reference_delta that no shortlist holds have no gradient on either side
    ours = torch.autograd.grad(ours, parameters)
    for mine, reference in zip(ours, torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, reference, **close)


def test_policy_covers_the_whole_vocabulary():
    head = make_head(shortlist_size=16)
    states = torch.randn(3, HIDDEN)
    probs = head(states).softmax(-1)
    assert (probs > 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))


def test_tail_of_tiny_mass_keeps_its_precision():
    """The tail's mass is summed directly, not as one minus the shortlist's, which would round to nothing."""
    logits = torch.full((1, 100), -30.0)
    logits[0, :4] = torch.tensor([5.0, 4.0, 3.0, 2.0])
    exact = torch.logsumexp(logits[0, 4:].double(), 0)
    shortlist, tail_probs = build_shortlist(logits.clone(), 4)
    assert shortlist.tail_logsumexp.item() == pytest.approx(exact.item(), abs=1e-5)
    assert shortlist.tail_entropy.item() == pytest.approx(torch.tensor(96.0).log().item(), abs=1e-4)
    assert tail_probs[0, :4].sum() == 0


def test_inverse_cdf_follows_the_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, -torch.inf]])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    slots = sample_slots(logits.expand(10_000, -1), uniforms)
    shares = torch.bincount(slots, minlength=4) / 10_000
    torch.testing.assert_close(shares, logits.softmax(-1)[0], atol=2e-4, rtol=0)
    assert sample_slots(logits, torch.zeros(1)).item() == 0
    assert (
        sample_slots(logits, torch.tensor([1.0 - 1e-16])).item() == 2
    )  # never the token of probability zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.double], ids=["in place", "gathered"])
@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_shortlist_product_gradient(tokens, dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    ids = torch.randint(50, (tokens, 5))  # in no order, some twice
    g = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    out = shortlist_product(g, weight, ids)
    naive_out = (g.unsqueeze(1) * weight[ids]).sum(-1)
    torch.testing.assert_close(out.to(dtype), naive_out, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (g, weight), upstream)
    for mine, reference in zip(
        ours, torch.autograd.grad(naive_out, (g, weight), upstream.to(dtype)), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_shortlist_product(dtype):
    """Sums and their input are not rounded to half precision."""
    for tokens, listed, width in [
        (1, 5, 8),
        (7, 1, 100),
        (130, 12, 33),
        (12, 12, 12),
        (33, 12, 33),
        (50, 12, 33),
    ]:
        compiled = compiled_product(dtype, 50, width, listed)
        torch.manual_seed(0)
        weight, ids = torch.randn(50, width).to(dtype), torch.randint(50, (tokens, listed))
        g = torch.randn(width, tokens).t().requires_grad_()
        out = shortlist_product(g, weight, ids, compiled)
        exact = (g.unsqueeze(1) * weight[ids].float()).sum(-1)
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(out)
        found, expected = (torch.autograd.grad(o, g, upstream)[0] for o in (out, exact))
        torch.testing.assert_close(found, expected, **(BFLOAT16 if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("given", ["half", "double", "columns", "int32", "a part of the ids"])
def test_what_is_compiled_takes_what_the_kernel_takes(given):
    torch.manual_seed(0)
    weight, g, ids = torch.randn(50, 8), torch.randn(6, 8), torch.randint(50, (6, 5))
    if given in ("half", "double"):
        g = g.to(torch.bfloat16 if given == "half" else torch.double)
    g = g.t().contiguous().t() if given == "columns" else g
    ids = (
        ids.int()
        if given == "int32"
        else torch.randint(50, (6, 9))[:, :5]
        if given == "a part of the ids"
        else ids
    )
    expected = (g.float().unsqueeze(1) * weight[ids.long()]).sum(-1)
    torch.testing.assert_close(
        shortlist_product(g, weight, ids, compiled_product(torch.float32, 50, 8, 5)), expected
    )


def test_a_head_that_is_moved_leaves_its_compiled_product():
    head = TeaHead(torch.nn.Linear(8, 50, bias=False), HeadConfig(hidden_sizes=[4], shortlist_size=6))
    head.use_compiler()
    torch.nn.init.normal_(head.members.readout, std=0.3)
    states, ids = torch.randn(3, 8), torch.randint(50, (3, 6))
    plain = head.disagreement(states)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head.disagreement(states), plain, rtol=0.1, atol=0.1)
    assert head.to("meta").shortlist_correction(states.to("meta"), ids.to("meta"))[0].device.type == "meta"


@pytest.mark.parametrize(("vocabulary", "size"), [(2000, 10), (2007, 100), (2015, 1), (300, 200), (16, 15)])
@pytest.mark.parametrize("distinct", [True, False])
def test_largest_is_topk(vocabulary, size, distinct):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=generator)
    if not distinct:
        logits = logits.round()
    top, ids = largest(logits, size)
    assert torch.equal(top, logits.topk(size, dim=-1).values)
    assert torch.equal(logits.gather(1, ids), top)
    assert all(len(row.unique()) == size for row in ids)
    # The last tokens belong to no bundle.
    logits[:, -1] = 100
    assert (largest(logits, size)[1][:, 0] == vocabulary - 1).all()
