"""The chunked loss over the whole vocabulary equals the naive one, values and gradients, and never holds ``N x V`` numbers."""

import itertools

import pytest
import torch
from naive_policy import HIDDEN, TOKENS, VOCAB, make_head, naive_terms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tea_rl.head import full_vocabulary

ANCHORS = ["reverse_kl", "forward_kl", "logit_l1"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONTEXT = {"layers": [1, -1], "horizons": ["all", 4.0]}

COMBINATIONS = [
    {"readout": readout, "member_kind": kind, "aggregation": aggregation, "train_reference": moved, **context}
    for readout, kind, aggregation, moved, context in itertools.product(
        ["tied", "vocab"], ["mlp", "memory"], ["sum", "mean"], [False, True], [{}, {"context": CONTEXT}]
    )
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several blocks and chunks, the last of each a short one."""
    monkeypatch.setattr(full_vocabulary, "TOKEN_BLOCK", 7)
    monkeypatch.setattr(full_vocabulary, "VOCABULARY_CHUNK", 64)


def assert_equals_naive(head, states, actions, temperature, anchor, at=None):
    terms = head.full_terms(states, actions, temperature, anchor, at)
    expected = naive_terms(head, states if at is None else states[at], actions, temperature)
    names = ["logps", anchor, "reverse_kl", "entropy"]
    for name, term in zip(names, terms[:4], strict=True):
        torch.testing.assert_close(
            term, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    weights = torch.randn(4, len(actions))
    ours = sum((w * term).mean() for w, term in zip(weights, terms[:4], strict=True))
    theirs = sum((w * expected[name]).mean() for w, name in zip(weights, names, strict=True))
    parameters = dict(head.named_parameters())
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    mine = torch.autograd.grad(ours, trainable.values(), allow_unused=True)
    reference = torch.autograd.grad(theirs, trainable.values(), allow_unused=True)
    for name, a, b in zip(trainable, mine, reference, strict=True):
        zeros = torch.zeros_like(trainable[name])
        torch.testing.assert_close(
            zeros if a is None else a,
            zeros if b is None else b,
            **CLOSE,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize(
    "config", COMBINATIONS, ids=lambda config: "-".join(map(str, list(config.values())[:4]))
)
def test_equals_naive(small_chunks, config, anchor):
    head = make_head(shortlist_size="all", **config)
    torch.manual_seed(2)
    states, actions = torch.randn(TOKENS, head.state_width), torch.randint(VOCAB, (TOKENS,))
    assert_equals_naive(head, states, actions, 0.8, anchor)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize(
    ("logit_scale", "strength", "spread", "config"),
    [
        (0.3, 1.0, 0.05, {"bias": True}),
        (2.0, 0.5, 0.05, {"random_widths": True, "feature_fraction": 0.4}),
        (1.0, 0.0, 0.05, {}),
        (1.0, 1.0, 0.0, {}),
        (1.0, 1.0, 0.1, {"readout": "vocab"}),
    ],
)
def test_equals_naive_at_other_scales(small_chunks, logit_scale, strength, spread, config, anchor):
    head = make_head(logit_scale, spread, shortlist_size="all", **config)
    head.strength = strength
    torch.manual_seed(3)
    states, actions = torch.randn(TOKENS, HIDDEN), torch.randint(VOCAB, (TOKENS,))
    assert_equals_naive(head, states, actions, 1.3, anchor)


def test_actions_that_share_a_state(small_chunks):
    head = make_head(shortlist_size="all", readout="vocab")
    states, at = torch.randn(12, HIDDEN), torch.randint(12, (TOKENS,))
    assert_equals_naive(head, states, torch.randint(VOCAB, (TOKENS,)), 1.0, "reverse_kl", at)


def test_half_precision_stays_close(small_chunks):
    head = make_head(shortlist_size="all")
    states, actions = torch.randn(TOKENS, HIDDEN), torch.randint(VOCAB, (TOKENS,))
    exact = head.full_terms(states, actions)
    head.weight.data = head.weight.data.to(torch.bfloat16)
    rough = head.full_terms(states.to(torch.bfloat16), actions)
    assert all(term.dtype == torch.float32 for term in rough[:4])
    torch.testing.assert_close(rough.logps, exact.logps, rtol=0.05, atol=0.1)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return out


def test_never_holds_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(full_vocabulary, "TOKEN_BLOCK", 64)
    monkeypatch.setattr(full_vocabulary, "VOCABULARY_CHUNK", 32)
    head = make_head(shortlist_size="all", num_members=1)
    states, actions = torch.randn(1024, HIDDEN), torch.randint(VOCAB, (1024,))
    with LargestTensor() as seen:
        terms = head.full_terms(states, actions)
        (terms.logps + terms.kl).mean().backward()
    assert seen.size <= 1024 * 48  # the members' features; N x V would be 307,200
