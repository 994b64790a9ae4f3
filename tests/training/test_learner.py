"""The update on its own: what moves, what stops it, and what a bad number does."""

import math

import pytest
import torch
from tiny import tiny_backbone

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.training.learner import Learner
from tea_rl.training.optimization import build_scheduler


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


def make(backbone, *, shortlist_size=24, objective=None, anchor=None, **train):
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=shortlist_size))
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another")]
    tokens = generate(backbone, head, prompts, DecodeSettings(8, 12)).tokens
    train = TrainConfig(**{"learning_rate": 1e-3, "warmup_steps": 0, **train})
    objective = ObjectiveConfig(
        **{"name": "grpo", "inner_epochs": 4, "minibatch_tokens": 64, **(objective or {})}
    )
    learner = Learner(head, objective, AnchorConfig(**(anchor or {})), train, 1.0, total_steps=10)
    return head, tokens, learner


def generator():
    return torch.Generator().manual_seed(0)


def terms(head, tokens):
    if tokens.shortlist is None:
        return head.full_terms(tokens.states, tokens.actions)
    return head.shortlist_terms(tokens.states, tokens.shortlist, tokens.slots, tokens.within_tail_logps)


@pytest.mark.parametrize("shortlist_size", [24, "all"])
@pytest.mark.parametrize("optim", ["adamw", "sgd", "ademamix"])
def test_rewarded_tokens_become_likelier(backbone, shortlist_size, optim):
    rate = {"learning_rate": 0.3} if optim == "sgd" else {}
    head, tokens, learner = make(backbone, shortlist_size=shortlist_size, optim=optim, **rate)
    good = tokens.actions % 2 == 0
    learner.update(tokens, torch.where(good, 1.0, -1.0), generator())
    gain = terms(head, tokens).logps - tokens.logps
    assert gain[good].mean() > gain[~good].mean() + 0.1


def test_trust_region_ends_the_inner_epochs(backbone):
    _, tokens, eager = make(backbone, objective={"inner_epochs": 50, "target_kl": None}, learning_rate=1e-2)
    advantage = torch.randn(len(tokens), generator=generator())
    assert eager.update(tokens, advantage, generator()).inner_epochs == 50
    head, tokens, bounded = make(
        backbone, objective={"inner_epochs": 50, "target_kl": 0.01}, learning_rate=1e-2
    )
    report = bounded.update(tokens, advantage, generator())
    assert 1.0 <= report.inner_epochs < 50  # the first pass always completes


def test_conservativity_holds_the_policy_back(backbone):
    moved = {}
    for conservativity in (0.0, 2.0):
        head, tokens, learner = make(
            backbone,
            anchor={"conservativity": conservativity},
            objective={"inner_epochs": 20, "target_kl": None},
        )
        learner.update(tokens, torch.randn(len(tokens), generator=generator()), generator())
        moved[conservativity] = terms(head, tokens).kl.mean().item()
    assert 0 < moved[2.0] < 0.7 * moved[0.0]


@pytest.mark.parametrize("shortlist_size", [24, "all", "auto"])
def test_entropy_follows_its_coefficient(backbone, shortlist_size):
    """With nothing else to learn, a bonus spreads the policy and a price sharpens it."""
    after = {}
    for coef in (0.0, 0.5, -0.5):
        head, tokens, learner = make(
            backbone,
            shortlist_size=shortlist_size,
            anchor={"conservativity": 0.0},
            objective={"entropy_coef": coef, "inner_epochs": 20, "target_kl": None},
        )
        learner.update(tokens, torch.zeros(len(tokens)), generator())
        after[coef] = head.terms(tokens).entropy.mean().item()
    assert after[-0.5] < after[0.0] - 0.02 and after[0.0] + 0.005 < after[0.5]


def test_warm_up_starts_above_zero_and_ends_at_the_rate(backbone):
    _, tokens, learner = make(backbone, warmup_steps=4)
    zero = torch.zeros(len(tokens))
    rates = [learner.update(tokens, zero, generator()).learning_rate for _ in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_a_decay_ends_above_zero(backbone):
    _, tokens, learner = make(backbone, lr_scheduler_type="linear")
    zero = torch.zeros(len(tokens))
    rates = [learner.update(tokens, zero, generator()).learning_rate for _ in range(10)]
    assert rates[0] == pytest.approx(1e-3 * 10 / 11) and rates[-1] == pytest.approx(1e-3 / 11)


def test_no_advantage_no_change_without_an_anchor(backbone):
    head, tokens, learner = make(backbone, anchor={"conservativity": 0.0})
    before = {name: value.clone() for name, value in head.head_state().items()}
    learner.update(tokens, torch.zeros(len(tokens)), generator())
    assert all(torch.equal(value, before[name]) for name, value in head.head_state().items())


def test_bad_numbers_are_skipped_counted_and_end_in_an_error(backbone):
    head, tokens, learner = make(backbone, max_skipped_steps=7)
    advantage = torch.ones(len(tokens))
    before = {name: value.clone() for name, value in head.head_state().items()}
    poisoned = torch.full((len(tokens),), math.nan)
    minibatches = math.ceil(len(tokens) / 64)
    learner.objective.inner_epochs = 1
    assert minibatches < 7
    report = learner.update(tokens, poisoned, generator())
    assert report.skipped_steps == minibatches
    assert all(torch.equal(value, before[name]) for name, value in head.head_state().items())
    learner.update(tokens, advantage, generator())  # a good step ends the streak, the count stays
    assert learner.skipped_in_a_row == 0 and learner.skipped_steps == minibatches
    with pytest.raises(TeaError, match="7 updates in a row"):
        for _ in range(7):
            learner.update(tokens, poisoned, generator())
    assert head.is_finite()


def test_state_round_trip_continues_the_schedule(backbone):
    _, tokens, first = make(backbone, warmup_steps=8)
    advantage = torch.ones(len(tokens))
    for _ in range(3):
        first.update(tokens, advantage, generator())
    _, _, second = make(backbone, warmup_steps=8)
    second.load_state(first.state())
    expected = first.update(tokens, advantage, generator()).learning_rate
    assert second.update(tokens, advantage, generator()).learning_rate == expected


def test_shared_states_change_no_gradient(backbone):
    """Computing once for tokens of one state gives the gradients of computing for each."""
    head, _, learner = make(backbone)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.members.readout, std=0.05)
    prompt = [backbone.tokenizer("one").input_ids]
    tokens = generate(backbone, head, prompt, DecodeSettings(32, 3)).tokens
    assert len(tokens.state_ids.unique()) < len(tokens)
    same = [tokens.states[tokens.state_ids == i] for i in tokens.state_ids.unique()]
    assert all(torch.equal(rows, rows[:1].expand_as(rows)) for rows in same)
    each = terms(head, tokens)
    shared = learner._terms(tokens)
    weights = torch.randn(len(tokens), generator=generator())
    for one, other in zip(each, shared, strict=True):
        torch.testing.assert_close(one, other)
    parameters = head.trainable_parameters()
    mine = torch.autograd.grad((weights * (shared.logps + shared.kl)).sum(), parameters)
    for grad, reference in zip(
        mine, torch.autograd.grad((weights * (each.logps + each.kl)).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "places"), [(0, 7), (3, 7), (7, 7), (9, 5)])
def test_schedules_are_those_of_transformers(name, warmup, places):
    from transformers import get_scheduler

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = make(optimizer)
        found = []
        for _ in range(places + 3):
            optimizer.step()
            found.append(scheduler.get_last_lr()[0])
            scheduler.step()
        return found

    train = TrainConfig(lr_scheduler_type=name, warmup_steps=warmup)
    theirs = rates(lambda o: get_scheduler(name, o, num_warmup_steps=warmup, num_training_steps=places))
    assert rates(lambda o: build_scheduler(o, train, places)) == pytest.approx(theirs)


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_gradients_are_clipped_as_torch_clips_them(backbone, limit):
    """Those within the limit are left as they are; what is not trained has none."""
    head, _, learner = make(backbone, optim="sgd", learning_rate=1.0, max_grad_norm=limit)
    idle, *moved = head.trainable_parameters()
    given = [torch.randn(parameter.shape, generator=generator()) for parameter in moved]
    scale = sum(float(gradient.square().sum()) for gradient in given) ** -0.5  # of length 1, all together
    before = [parameter.detach().clone() for parameter in moved]
    loss = sum((parameter * gradient).sum() for parameter, gradient in zip(moved, given, strict=True)) * scale
    assert learner.descend(loss) == pytest.approx(1.0, rel=1e-5)
    assert idle.grad is None
    for parameter, old, gradient in zip(moved, before, given, strict=True):
        wanted = old - gradient * scale * min(1.0, limit)
        torch.testing.assert_close(parameter.detach(), wanted, atol=1e-5, rtol=1e-4)
