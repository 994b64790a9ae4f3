"""Conditioning on a desired return."""

import json

import pytest
import torch
from naive_policy import HIDDEN, VOCAB, make_head
from tiny import tiny_backbone
from torch import nn

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.head.returns import FREQUENCIES, NUM_FEATURES, RETURN_GAIN, ReturnModulation
from tea_rl.head.shared import shared_corrections
from tea_rl.objectives.supervised import cross_entropy
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.rollout.trajectory import TokenBatch

KINDS = [
    {"shortlist_size": 24},
    {"shortlist_size": "all", "feature_fraction": 0.5, "random_widths": True},
    {"shortlist_size": "auto", "readout": "vocab"},
    {"shortlist_size": 24, "member_kind": "memory", "train_reference": True},
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def names(kind):
    return "-".join(map(str, kind.values()))


def conditioned(**config) -> TeaHead:
    """A head whose every parameter, the modulation's too, is away from its initial value."""
    head = make_head(return_conditioning=True, **config)
    head.fit_returns(torch.tensor([0.0, 1.0, 1.0, torch.nan]))
    return head


def batch_of(head: TeaHead, states, actions, state_ids=None) -> TokenBatch:
    count = len(actions)
    shortlist, slots, within = None, actions, torch.zeros(count)
    if not head.full_vocabulary:
        shortlist, tail = head.shortlist_of(states)
        hits = shortlist.ids == actions.unsqueeze(1)
        inside = hits.any(1)
        slots = torch.where(inside, hits.int().argmax(1), shortlist.ids.shape[1])
        within = torch.where(inside, 0.0, tail.gather(1, actions.unsqueeze(1)).squeeze(1).log())
    nothing, numbers = torch.zeros(count), torch.arange(count)
    return TokenBatch(
        states, shortlist, actions, slots, within, nothing, nothing, nothing, nothing,
        numbers if state_ids is None else state_ids, numbers, numbers,
    )  # fmt: skip


def test_modulation_is_what_its_docstring_says():
    modulation = ReturnModulation(2, 3)
    nn.init.normal_(modulation.gain)
    modulation.fit(torch.tensor([1.0, 3.0]))
    returns = torch.tensor([2.5, torch.nan, -40.0])
    gamma, beta = modulation(returns)
    u = torch.asinh((returns[[0, 2]] - 2.0) / 1.0)
    phi = [u]
    for f in FREQUENCIES:
        phi += [(f * u).sin() / f, (f * u).cos() / f]
    expected = RETURN_GAIN * torch.einsum("pn,kpf->knf", torch.stack(phi), modulation.gain)
    assert len(phi) == NUM_FEATURES
    torch.testing.assert_close(torch.cat([gamma, beta], -1)[:, [0, 2]], expected)
    assert gamma[:, 1].abs().max() == 0 and beta[:, 1].abs().max() == 0


def test_what_lies_beyond_the_training_returns_is_said():
    modulation = ReturnModulation(2, 3)
    assert modulation.beyond_training(1e9) is None  # nothing was seen yet
    modulation.fit(torch.tensor([-0.5, torch.nan, 2.0, 1.0]))
    assert [modulation.beyond_training(value) for value in (-0.5, 0.0, 2.0)] == [None] * 3
    for value in (-0.6, 3.0):
        assert "lies outside the -0.5 to 2 seen" in modulation.beyond_training(value)
    again = ReturnModulation(2, 3)
    again.load_state_dict(modulation.state_dict())
    assert again.beyond_training(3.0) == modulation.beyond_training(3.0)


@pytest.mark.parametrize("context", [{}, {"layers": [-1]}])
def test_members_read_the_modulated_norm(context):
    """Against the same members with the modulation written into scale and shift of their norm."""
    head = conditioned(shortlist_size=24, context=context)
    members = head.members
    states = torch.randn(5, head.state_width)
    returns = torch.tensor([0.0, 1.0, 0.5, torch.nan, 7.0])
    together = members(states, returns)
    scale, shift = members.norm_scale.data.clone(), members.norm_shift.data.clone()
    for row, value in enumerate(returns):
        gamma, beta = members.modulation(value)
        members.norm_scale.data, members.norm_shift.data = scale + gamma, shift + beta
        for mine, expected in zip(together, members(states[row : row + 1]), strict=True):
            torch.testing.assert_close(mine[row : row + 1], expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_fresh_head_is_the_base_model_and_blind_to_returns(kind):
    reference = nn.Linear(HIDDEN, VOCAB).requires_grad_(False)
    head = TeaHead(reference, HeadConfig(return_conditioning=True, **kind))
    states = torch.randn(3, 4, HIDDEN)
    head.set_return(5.0)
    assert torch.equal(head(states), reference(states))
    nn.init.normal_(head.members.readout)
    if head.config.readout == "vocab":
        nn.init.normal_(head.members.vocab_readout)
    corrected = head(states)
    head.set_return(-3.0)
    assert not torch.allclose(corrected, reference(states))
    torch.testing.assert_close(head(states), corrected)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_an_unknown_return_is_a_head_without_conditioning(kind):
    head, plain = conditioned(**kind), make_head(**kind)
    own = {name: v for name, v in head.state_dict().items() if "modulation" not in name}
    plain.load_state_dict(own)
    states = torch.randn(6, HIDDEN)
    assert torch.equal(head(states), plain(states))
    torch.testing.assert_close(head(states, torch.full((6,), torch.nan)), plain(states), **CLOSE)
    assert (head(states, torch.ones(6)) - plain(states)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_returns_set_and_returns_given_agree(kind):
    """One number, one a row and one a position; strength 0 is the base model whatever is asked."""
    head = conditioned(**kind)
    states = torch.randn(2, 3, HIDDEN)
    asked = torch.tensor([0.0, 1.0])
    each = torch.stack([head(states[row], value) for row, value in enumerate(asked)])
    torch.testing.assert_close(head(states, asked), each, **CLOSE)
    torch.testing.assert_close(head(states, asked.unsqueeze(1).expand(2, 3)), each, **CLOSE)
    head.set_return(asked)
    torch.testing.assert_close(head(states), each, **CLOSE)
    head.set_return(1.0)
    torch.testing.assert_close(head(states[1]), each[1], **CLOSE)
    assert (head(states[0]) - each[0]).abs().max() > 0.01
    disagreement = head.disagreement(states)
    head.set_return(None)
    assert (head.disagreement(states) - disagreement).abs().max() > 1e-6
    head.strength = 0.0
    head.set_return(1.0)
    assert torch.equal(head(states), nn.functional.linear(states, head.weight, head.bias))


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_terms_at_returns_are_those_of_the_logits(kind):
    """Tokens of one state with different returns included: they must not share their work."""
    head = conditioned(**kind)
    states = torch.randn(4, HIDDEN)[[0, 0, 1, 2, 2, 3]]
    returns = torch.tensor([0.0, 1.0, 0.5, torch.nan, torch.nan, 1.0])
    actions = torch.randint(VOCAB, (6,))
    batch = batch_of(head, states, actions, torch.tensor([0, 0, 1, 2, 2, 3]))
    logps = head(states, returns).log_softmax(-1)
    expected = logps.gather(1, actions.unsqueeze(1)).squeeze(1)
    found = head.terms(batch, returns=returns)
    torch.testing.assert_close(found.logps, expected, **CLOSE)
    base = head.reference_logits(states).log_softmax(-1)
    torch.testing.assert_close(found.kl, (logps.exp() * (logps - base)).sum(-1), **CLOSE)
    head.set_return(returns)
    torch.testing.assert_close(head.terms(batch).logps, expected, **CLOSE)
    head.set_return(1.0)
    same = head(states).log_softmax(-1).gather(1, actions.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(head.terms(batch).logps, same, **CLOSE)


def test_sampled_estimate_reads_the_returns():
    head = conditioned(shortlist_size="auto").train()
    states, actions = torch.randn(40, HIDDEN), torch.randint(VOCAB, (40,))
    batch, returns = batch_of(head, states, actions), torch.rand(40)
    estimate = head.terms(batch, returns=returns).logps
    exact = head.eval().terms(batch, returns=returns).logps
    torch.testing.assert_close(estimate, exact, atol=0.05, rtol=0.0)
    assert (head.terms(batch).logps - exact).abs().max() > 0.1


def test_heads_side_by_side_read_their_own_returns():
    reference = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    heads = [
        TeaHead(reference, HeadConfig(shortlist_size=24, return_conditioning=on), seed=seed)
        for seed, on in enumerate([True, False, True])
    ]
    for head in heads:
        for parameter in head.trainable_parameters():
            nn.init.normal_(parameter, std=0.1)
    states, returns = torch.randn(5, HIDDEN), torch.rand(5)
    ids = heads[0].shortlist_of(states)[0].ids
    together = shared_corrections(heads, states, ids, returns)
    for head, found in zip(heads, together, strict=True):
        own = returns if head.config.return_conditioning else None
        for mine, expected in zip(found, head.shortlist_correction(states, ids, own), strict=True):
            torch.testing.assert_close(mine, expected, **CLOSE)


def test_a_head_learns_to_do_what_it_is_asked():
    """The label depends on the return alone, over five levels: not one sign, but each level must be told apart."""
    torch.manual_seed(0)
    reference = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    head = TeaHead(reference, HeadConfig(hidden_sizes=[32], shortlist_size="all", return_conditioning=True))
    levels = torch.tensor([-2.0, 0.0, 0.25, 0.5, 1.0])
    labels = torch.tensor([7, 3, 90, 11, 42])
    states = torch.randn(400, HIDDEN)
    which = torch.randint(5, (400,))
    head.fit_returns(levels[which])
    optimizer = torch.optim.AdamW(head.trainable_parameters(), lr=3e-3)
    head.train()
    for _ in range(100):
        index = torch.randperm(400)[:128]
        batch = batch_of(head, states[index], labels[which[index]])
        loss = cross_entropy(head.terms(batch, returns=levels[which[index]]).logps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    held_out = torch.randn(50, HIDDEN)
    for level, label in zip(levels, labels, strict=True):
        head.set_return(level.item())
        followed = head(held_out).softmax(-1)[:, label].mean()
        assert followed > 0.8, (level, followed)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_decode_follows_the_return_and_equals_the_drop_in(tmp_path, kind):
    backbone = tiny_backbone(tmp_path)
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], return_conditioning=True, **kind))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        head.members.modulation.gain.mul_(0.1)  # it is read at a gain
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another")]
    texts = {}
    for value in (0.0, 1.0, None):
        head.set_return(value)
        rollout = generate(backbone, head, prompts, DecodeSettings(3, 8, temperature=0.9))
        tokens = rollout.tokens
        logps = (head(tokens.states) * backbone.logit_scale / 0.9).log_softmax(-1)
        chosen = logps.gather(1, tokens.actions.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(chosen, tokens.logps, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head.terms(tokens, 0.9).logps, tokens.logps, atol=1e-4, rtol=1e-4)
        texts[value] = tuple(rollout.texts)
    assert len(set(texts.values())) == 3
    head.set_return(1.0)
    backbone.install(head)
    ids = torch.tensor([prompts[0]])
    through_model = backbone.model(ids).logits[:, -1]
    backbone.uninstall()
    state = backbone.forward(ids)[:, -1]
    torch.testing.assert_close(through_model, head(state), **CLOSE)


@pytest.mark.parametrize("kind", KINDS, ids=names)
@pytest.mark.parametrize("asked", [None, 0.75])
def test_save_and_load(tmp_path, kind, asked):
    backbone = tiny_backbone(tmp_path)
    head = TeaHead.for_backbone(backbone, HeadConfig(return_conditioning=True, **kind), seed=3)
    with torch.no_grad():
        for parameter in head.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    head.fit_returns(torch.tensor([-3.0, 4.0, 4.5]))
    head.set_return(asked)
    head.save_pretrained(tmp_path / "head")
    assert "head.set_return(" in (tmp_path / "head" / "README.md").read_text()
    loaded = TeaHead.from_pretrained(tmp_path / "head", backbone)
    states = torch.randn(5, backbone.hidden_size)
    assert torch.equal(loaded(states), head.eval()(states))
    assert torch.equal(loaded(states, torch.arange(5.0)), head(states, torch.arange(5.0)))
    assert (None if loaded.asked_return is None else loaded.asked_return.item()) == asked


def test_a_head_without_conditioning_is_saved_as_ever(tmp_path):
    backbone = tiny_backbone(tmp_path)
    head = TeaHead.for_backbone(backbone)
    head.save_pretrained(tmp_path / "head")
    config = json.loads((tmp_path / "head" / "tea_config.json").read_text())
    assert "return_conditioning" not in config["head"] and "asked_return" not in config
    assert not [name for name in head.head_state() if "modulation" in name]
    assert TeaHead.from_pretrained(tmp_path / "head", backbone).config == head.config


def test_what_makes_no_sense_is_refused_in_one_line():
    plain, head = make_head(shortlist_size=24), conditioned(shortlist_size=24)
    states = torch.randn(4, HIDDEN)
    for ask in (
        lambda: plain.set_return(1.0),
        lambda: plain(states, torch.ones(4)),
        lambda: plain.fit_returns(torch.ones(4)),
    ):
        with pytest.raises(TeaError, match=r"without head\.return_conditioning"):
            ask()
    plain.set_return(None)
    for value in (float("inf"), float("nan"), torch.ones(2, 2)):
        with pytest.raises(TeaError, match="one finite number") as error:
            head.set_return(value)
        assert "\n" not in str(error.value)
    with pytest.raises(TeaError, match=r"\(3,\) returns.*\(4,\)"):
        head(states, torch.ones(3))
    for returns in (torch.full((3,), torch.nan), torch.tensor([1.0, torch.inf])):
        with pytest.raises(TeaError, match="finite training returns"):
            head.fit_returns(returns)
    head.fit_returns(torch.full((5,), 2.0))  # all alike: still a scale to measure by
    assert torch.isfinite(head(states, torch.ones(4))).all()


@pytest.mark.parametrize("returns", [None, torch.tensor([1.0, 1.0, 0.5, torch.nan, torch.nan, 0.5])])
def test_work_shared_by_equal_states_or_done_by_each_token_is_the_same(returns, monkeypatch):
    head = conditioned(shortlist_size=12)
    at = torch.tensor([0, 1, 1, 0, 2, 1])
    states = torch.randn(3, head.hidden_size, generator=torch.Generator().manual_seed(1))[at]
    batch = batch_of(head, states, torch.tensor([3, 9, 17, 3, 40, 22]), at + 5)
    found = []
    for share in (0.0, 1.0):  # never shared; shared wherever two are equal
        monkeypatch.setattr("tea_rl.head.layer._MOSTLY_ALONE", share)
        head.zero_grad(set_to_none=True)
        terms = head.terms(batch, returns=returns)
        (terms.logps.sum() + terms.kl.square().sum()).backward()
        gradients = [part.grad.flatten() for part in head.trainable_parameters() if part.grad is not None]
        found.append((torch.stack(terms[:4]).detach(), torch.cat(gradients)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found[0][1].abs().sum() > 0
