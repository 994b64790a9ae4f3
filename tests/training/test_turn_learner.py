"""Updates from rollouts whose turns are partly written, partly decided between listed answers, against naive computations."""

import math

import easy_envs
import gymnasium
import pytest
import torch
from tiny import tiny_backbone

from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout import ConversationFormat, EpisodeSettings, EpisodeStart, run_episodes
from tea_rl.training.turn_learner import TurnLearner


class Halves(easy_envs.Pick):
    """`Pick` that lists its answers at the first turn only."""

    def _info(self, turn):
        info = super()._info(turn)
        if turn is not None:
            info.pop("admissible", None)
        return info


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


def rollout(backbone, make_env=Halves, **changes):
    """A rollout, a head that has moved on since, and its learner."""
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=24))
    torch.manual_seed(0)
    torch.nn.init.normal_(head.members.readout, std=0.1)
    settings = EpisodeSettings(
        max_new_tokens=3, conversation=ConversationFormat("plain"), choose_admissible=True
    )
    starts = [EpisodeStart(index, generation) for index in range(3) for generation in range(4)]
    batch = run_episodes(backbone, head, make_env, starts, settings)
    with torch.no_grad():
        head.members.readout.add_(0.02 * torch.randn_like(head.members.readout))
    objective = {"inner_epochs": 1, "minibatch_tokens": 10**6, "clip_range": 0.1, "target_kl": None}
    learner = TurnLearner(
        head,
        ObjectiveConfig(**{**objective, **changes.pop("objective", {})}),
        AnchorConfig(**{"conservativity": 0.5, **changes.pop("anchor", {})}),
        TrainConfig(max_grad_norm=1e9, learning_rate=1e-3, warmup_steps=0),
        1.0,
        50,
    )
    return batch, head, learner


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_logps(backbone, head, tokens):
    """Log-probabilities of recorded tokens under a head and under the original model, from full logits."""
    each = torch.arange(len(tokens))
    return [
        (logits * backbone.logit_scale).log_softmax(-1)[each, tokens.actions]
        for logits in (head(tokens.states), backbone.reference(tokens.states))
    ]


def naive_anchor(name, own, base):
    """Distance between two policies over the choices of one decision, from the log-probabilities of the choices."""
    p, q = own.softmax(0), base.softmax(0)
    if name == "reverse_kl":
        return (p * (p.log() - q.log())).sum()
    if name == "forward_kl":
        return (q * (q.log() - p.log())).sum()
    return (own - base).abs().mean() / (base.std() + 1)


def surrogate(logp, behaviour, advantage):
    ratio = (logp - behaviour).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)


@pytest.mark.parametrize("entropy_coef", [0.0, -0.3])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "logit_l1"])
@pytest.mark.parametrize("make_env", [Halves, easy_envs.Pick])
def test_gradient_equals_a_naive_computation(backbone, divergence, make_env, entropy_coef):
    batch, head, learner = rollout(
        backbone, make_env, anchor={"divergence": divergence}, objective={"entropy_coef": entropy_coef}
    )
    choices, tokens = batch.choices, batch.tokens
    assert len(choices) == (12 if make_env is Halves else 24)
    assert (len(tokens) > 12) == (make_env is Halves)
    advantages = torch.randn(len(batch.turns), generator=generator(1))
    tasks, anchors, entropies = [], [], []
    own, base = naive_logps(backbone, head, choices.tokens)
    for decision in range(len(choices)):
        listed = (choices.decision_of_choice == decision).nonzero().flatten().tolist()
        sums = [
            torch.stack([logps[choices.tokens.rows == choice].sum() for choice in listed])
            for logps in (own, base)
        ]
        logp = sums[0].log_softmax(0)[listed.index(choices.chosen[decision])]
        entropies.append(-(sums[0].softmax(0) * sums[0].log_softmax(0)).sum())
        tasks.append(surrogate(logp, choices.logps[decision], advantages[choices.turns[decision]]))
        anchors.append(naive_anchor(divergence, *sums))
    if len(tokens):
        terms = head.terms(tokens, 1.0, divergence)
        tasks += list(
            surrogate(naive_logps(backbone, head, tokens)[0], tokens.logps, advantages[tokens.rows])
        )
        anchors += list(terms.anchor)
        own = (head(tokens.states) * backbone.logit_scale).log_softmax(-1)
        entropies += list(-(own.exp() * own).sum(-1))
    task = torch.stack(tasks).mean() - entropy_coef * torch.stack(entropies).mean()
    loss = (task + 0.5 * torch.stack(anchors).mean()) / 1.5
    parameters = head.trainable_parameters()
    expected = torch.autograd.grad(loss, parameters)
    report = learner.update_turns(tokens, choices, advantages, generator())
    assert report.loss == pytest.approx(loss.item(), abs=1e-5) and report.inner_epochs == 1
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


@pytest.mark.parametrize("taught", ["written", "decided"])
def test_both_kinds_of_turns_learn(backbone, taught):
    """Paid for one kind of turn only, in small minibatches: the likelihood of what was paid rises."""
    batch, head, learner = rollout(
        backbone, objective={"inner_epochs": 6, "minibatch_tokens": 24}, anchor={"conservativity": 0.0}
    )
    advantages = torch.zeros(len(batch.turns))
    kind = batch.tokens.rows.unique() if taught == "written" else batch.choices.turns
    advantages[kind] = 1.0

    def likelihood():
        with torch.no_grad():
            if taught == "written":
                return head.terms(batch.tokens, 1.0).logps.mean().item()
            own = naive_logps(backbone, head, batch.choices.tokens)[0]
            chosen = [own[batch.choices.tokens.rows == choice].sum() for choice in batch.choices.chosen]
            return torch.stack(chosen).mean().item()

    before = likelihood()
    report = learner.update_turns(batch.tokens, batch.choices, advantages, generator())
    assert likelihood() > before + 0.01
    assert report.inner_epochs == 6 and math.isfinite(report.loss)


def test_a_run_learns_from_both_kinds(backbone, tmp_path):
    """The trainer hands both over: what is paid in the written turns alone is learnt though others list answers."""
    import json

    from tea_rl import train
    from tea_rl.recipe import parse_recipe

    class Written(Halves):
        def step(self, action):
            observation, _, *rest = super().step(action)
            share = sum(ord(letter) % 2 == 0 for letter in action) / max(1, len(action))
            return observation, share if self._turn == 2 else 0.0, *rest

    gymnasium.register("EasyWritten-v0", entry_point=Written, disable_env_checker=True)
    try:
        recipe = parse_recipe(
            {
                "model": {"name_or_path": backbone.name_or_path, "dtype": "float32"},
                "head": {"hidden_sizes": [32, 16], "shortlist_size": 32},
                "env": {"id": "EasyWritten-v0", "num_starts": 8, "eval_starts": 0, "choose_admissible": True},
                "rollout": {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 4},
                "objective": {"inner_epochs": 3, "minibatch_tokens": 64},
                "train": {"learning_rate": 3e-3, "warmup_steps": 1, "max_steps": 10},
            }
        )
        train(recipe, tmp_path / "run")
    finally:
        del gymnasium.registry["EasyWritten-v0"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
