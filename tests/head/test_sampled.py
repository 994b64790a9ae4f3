"""``shortlist_size: auto``: exact where it must be, close to the full loss elsewhere."""

import itertools

import pytest
import torch
from naive_policy import HIDDEN, TOKENS, VOCAB, make_head, naive_terms

from tea_rl.errors import TeaError
from tea_rl.head import sampled
from tea_rl.head.policy import action_logps
from tea_rl.rollout.trajectory import TokenBatch

ANCHORS = ["reverse_kl", "forward_kl", "logit_l1"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONFIGS = [
    {"readout": readout, "member_kind": kind, "train_reference": moved}
    for readout, kind, moved in itertools.product(["tied", "vocab"], ["mlp", "memory"], [False, True])
]


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def actions() -> torch.Tensor:
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))


def terms_of(head, states, actions, anchor="reverse_kl", size=16, at=None):
    with torch.no_grad():
        shortlist, _ = head.shortlist_of(states, 0.8, size)
    return head.sampled_terms(states, actions, shortlist, 0.8, anchor, at)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_exact_once_every_token_is_looked_at(monkeypatch, states, actions, config, anchor):
    monkeypatch.setattr(sampled, "NUM_SAMPLES", 10**6)
    head = make_head(shortlist_size="auto", **config)
    terms = terms_of(head, states, actions, anchor)
    expected = naive_terms(head, states, actions, 0.8)
    names = ["logps", anchor, "reverse_kl", "entropy"]
    for name, term in zip(names, terms[:4], strict=True):
        torch.testing.assert_close(term, expected[name], rtol=1e-4, atol=1e-4)
    weights = torch.randn(4, TOKENS)
    parameters = [p for p in head.trainable_parameters() if p is not head.members.readout]
    ours = sum((w * term).mean() for w, term in zip(weights, terms[:4], strict=True))
    theirs = sum((w * expected[name]).mean() for w, name in zip(weights, names, strict=True))
    for mine, reference in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def test_a_fresh_head_is_exact_whatever_is_drawn(monkeypatch, states, actions):
    monkeypatch.setattr(sampled, "NUM_SAMPLES", 10)
    head = make_head(shortlist_size="auto", spread=0.0)
    terms, expected = terms_of(head, states, actions), naive_terms(head, states, actions, 0.8)
    torch.testing.assert_close(terms.logps, expected["logps"], **CLOSE)
    torch.testing.assert_close(terms.entropy, expected["entropy"], **CLOSE)
    assert terms.kl.abs().max() < 1e-6


def test_a_tail_that_moves_as_one_is_exact(monkeypatch, states, actions):
    """The base mass is the control variate: no error where the correction is constant over the tail."""
    monkeypatch.setattr(sampled, "NUM_SAMPLES", 10)
    head = make_head(shortlist_size="auto", readout="vocab")
    with torch.no_grad():
        head.members.vocab_readout[:] = head.members.vocab_readout[0]
    terms, expected = terms_of(head, states, actions), naive_terms(head, states, actions, 0.8)
    assert expected["logps"].isfinite().all()
    torch.testing.assert_close(terms.logps, expected["logps"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.kl, expected["reverse_kl"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.entropy, expected["entropy"], rtol=1e-4, atol=1e-4)


def test_small_bias(monkeypatch, states, actions):
    """The mean over many draws is close to the exact terms, though one draw sees a sixth of the vocabulary."""
    monkeypatch.setattr(sampled, "NUM_SAMPLES", 50)
    head = make_head(shortlist_size="auto", readout="vocab")
    torch.manual_seed(0)
    draws = [terms_of(head, states, actions) for _ in range(200)]
    expected = naive_terms(head, states, actions, 0.8)
    assert expected["reverse_kl"].mean() > 0.05
    for column, name in (("logps", "logps"), ("kl", "reverse_kl"), ("entropy", "entropy")):
        mean = torch.stack([getattr(draw, column) for draw in draws]).mean(dim=0)
        assert (mean - expected[name]).abs().mean() < 0.02, name
    assert all(draw.kl.min() >= -1e-5 for draw in draws)


def test_inclusion_probabilities_are_kept():
    inclusion = torch.rand(500) * 0.5
    inclusion[7] = 1.0
    torch.manual_seed(0)
    counts = torch.zeros(500)
    for _ in range(4000):
        tokens, certain = sampled._draw(inclusion)
        assert tokens[certain].tolist() == [7]
        assert abs(len(tokens) - inclusion.sum()) <= 1.0
        counts[tokens] += 1
    torch.testing.assert_close(counts / 4000, inclusion, atol=0.05, rtol=0)


def record(head, states, actions, with_shortlist: bool) -> TokenBatch:
    """Tokens as a store or a rollout records them; every state occurs twice."""
    at = torch.arange(TOKENS) // 2
    states = states[at]
    shortlist, tail_probs = head.shortlist_of(states, 0.8, 16)
    hit = shortlist.ids == actions.unsqueeze(1)
    slots = torch.where(hit.any(1), hit.int().argmax(1), 16)
    within = torch.where(hit.any(1), 0.0, tail_probs.gather(1, actions.unsqueeze(1)).squeeze(1).log())
    base_logps = action_logps(shortlist.slot_logits().log_softmax(-1), slots, within)
    zeros = torch.zeros(TOKENS)
    return TokenBatch(
        states=states,
        shortlist=shortlist if with_shortlist else None,
        actions=actions,
        slots=slots if with_shortlist else actions,
        within_tail_logps=within if with_shortlist else zeros,
        logps=base_logps,
        base_logps=base_logps,
        kl=zeros,
        entropy=zeros,
        state_ids=at * 3 + 1,
        rows=at,
        positions=at,
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_shortlist", [False, True])
@pytest.mark.parametrize("size", [16, "all", "auto"])
def test_terms_of_recorded_tokens(monkeypatch, states, actions, size, with_shortlist, training):
    """`TeaHead.terms` reads any record, with and without a shortlist, in the mode its configuration asks for."""
    monkeypatch.setattr(sampled, "NUM_SAMPLES", 10**6)
    head = make_head(shortlist_size=size).train(training)
    batch = record(head, states, actions, with_shortlist)
    if size == 16 and not with_shortlist:
        with pytest.raises(TeaError, match="no shortlist"):
            head.terms(batch, 0.8)
        return
    terms, expected = head.terms(batch, 0.8), naive_terms(head, batch.states, actions, 0.8)
    torch.testing.assert_close(terms.logps, expected["logps"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.kl, expected["reverse_kl"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.entropy, expected["entropy"], rtol=1e-4, atol=1e-4)


def test_terms_estimate_only_in_training(monkeypatch, states, actions):
    monkeypatch.setattr(sampled, "NUM_SAMPLES", 5)
    head = make_head(shortlist_size="auto")
    batch = record(head, states, actions, True)
    exact = naive_terms(head, batch.states, actions, 0.8)["logps"]
    torch.testing.assert_close(head.eval().terms(batch, 0.8).logps, exact, **CLOSE)
    assert (head.train().terms(batch, 0.8).logps - exact).abs().max() > 1e-3
    assert torch.equal(head.eval()(states), make_head(shortlist_size="all")(states))


def test_a_shortlist_of_another_size_is_refused(states, actions):
    batch = record(make_head(shortlist_size=16), states, actions, True)
    with pytest.raises(TeaError, match="shortlist_size is 8"):
        make_head(shortlist_size=8).terms(batch)
