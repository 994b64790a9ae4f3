"""Completions with one token replaced: which are asked, what is made of their rewards, and that it teaches."""

import hashlib
import json
import math

import pytest
import torch
import yaml
from tiny import save_tiny, tiny_backbone

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.objectives.advantages import advantages, reward_unit
from tea_rl.recipe import ObjectiveConfig
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.training.counterfactuals import Counterfactuals, ask, own_credit
from tea_rl.training.drawn import Drawn, credit

STOP = ("e",)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def head(backbone):
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=24))
    return head.eval()


def sample(backbone, head, stop=STOP):
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another", "third")]
    return generate(backbone, head, prompts, DecodeSettings(8, 10, stop=stop))


def asked(backbone, head, rollout, reward, count, rewards=None, seed=0, stop=STOP):
    """Counterfactuals, and the batches of texts that were scored for them."""
    batches = []

    def score(texts):
        batches.append(list(texts))
        return [reward(text) for text in texts]

    if rewards is None:
        rewards = torch.tensor([reward(text) for text in rollout.texts], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return ask(backbone, head, rollout, rewards, score, count, 1.0, stop, generator), batches


def test_one_token_of_each_completion_is_replaced_by_another_of_the_shortlist(backbone, head):
    rollout = sample(backbone, head)
    tokens = rollout.tokens
    edits, batches = asked(backbone, head, rollout, len, 3)
    assert len(batches) == 3 and all(len(batch) == len(rollout.texts) for batch in batches)
    assert (edits.actions != tokens.actions[edits.at]).all()
    assert (tokens.shortlist.ids[edits.at] == edits.actions.unsqueeze(1)).any(dim=1).all()
    ends = {
        token
        for token in range(backbone.vocab_size)
        if token in backbone.eos_token_ids or "e" in backbone.tokenizer.decode([token])
    }
    cut = 0
    for place, action, change in zip(*(part.tolist() for part in edits), strict=True):
        row = int(tokens.rows[place])
        ids, offset = rollout.token_ids(row).tolist(), int(tokens.positions[place])
        # What ended a completion stays: nobody knows what would follow.
        assert not (bool(rollout.finished[row]) and offset == len(ids) - 1)
        ids[offset] = action
        if action in ends:
            cut += offset < len(ids) - 1
            ids = ids[: offset + 1]
        text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
        assert any(batch[row] == text for batch in batches)
        assert change == len(text) - len(rollout.texts[row])
    assert cut > 0 and bool(rollout.finished.any())  # or the lines above say nothing


def test_a_completions_tokens_take_turns(backbone, head):
    rollout = sample(backbone, head, stop=())
    length = int(rollout.lengths[0])
    edits, _ = asked(backbone, head, rollout, len, length, stop=())
    free = len(rollout.tokens) - int(rollout.finished.sum())
    assert len(edits.at.unique()) == free
    again, _ = asked(backbone, head, rollout, len, length, stop=())
    assert all(torch.equal(one, other) for one, other in zip(edits, again, strict=True))
    others, _ = asked(backbone, head, rollout, len, length, seed=1, stop=())
    assert not torch.equal(edits.actions, others.actions)


def test_unknown_rewards_are_left_out(backbone, head):
    rollout = sample(backbone, head, stop=())
    rewards = torch.tensor([float(len(text)) for text in rollout.texts])
    rewards[3] = math.nan
    edits, _ = asked(backbone, head, rollout, len, 4, rewards, stop=())
    assert 3 not in rollout.tokens.rows[edits.at] and 4 in rollout.tokens.rows[edits.at]
    edits, _ = asked(backbone, head, rollout, lambda text: math.nan, 4, rewards, stop=())
    assert len(edits.changes) == 0


def test_own_credit_is_what_is_lost_without_the_token():
    edits = Counterfactuals(torch.tensor([0, 2, 2]), torch.tensor([7, 7, 8]), torch.tensor([-1.0, 0.5, 1.5]))
    own, asked = own_credit(edits, 4)
    assert own.tolist() == [1.0, 0.0, -1.0, 0.0] and asked.tolist() == [True, False, True, False]


def test_the_unit_of_credit_is_that_of_advantages():
    rewards = torch.tensor([[0.0, 4.0, 1.0], [2.0, 2.0, 2.0]])
    for name, scale in (
        ("grpo", "batch"),
        ("grpo", "none"),
        ("rloo", "group"),
        ("reinforce", "group"),
        ("ppo", "group"),
    ):
        unit, other = reward_unit(name, rewards, scale), advantages(name, rewards + 5.0, scale)
        # An advantage times its unit is a difference of rewards.
        difference = (other[0, 1] - other[0, 0]) * unit
        assert difference.item() == pytest.approx(6.0 if name == "rloo" else 4.0, rel=1e-3)
    # The other group is not scaled.
    assert reward_unit("grpo", rewards) == pytest.approx(rewards[0].std().item())
    # Many equal rewards, whose deviation rounding makes more than 0, have no unit; nor do they thin that of others.
    equal = torch.full((31, 64), 0.1)
    assert reward_unit("grpo", equal) == reward_unit("ppo", equal) == 0.0
    one_wrong = torch.tensor([[0.0] + [1.0] * 63])
    assert reward_unit("grpo", torch.cat([equal, one_wrong])) == pytest.approx(0.125)
    assert reward_unit("grpo", torch.tensor([[math.nan, 1.0], [math.nan, math.nan]])) == 0.0


def drawn_of(rollout):
    return Drawn(1, [0, 1, 2], rollout, 1.0)


def test_credit_mixes_the_tokens_own_with_its_completions(backbone, head):
    rollout = sample(backbone, head)
    total = [float(len(text)) for text in rollout.texts]
    edits, _ = asked(backbone, head, rollout, len, 4)

    def advantages_at(share):
        objective = ObjectiveConfig(counterfactuals=4, counterfactual_credit=share)
        return credit(drawn_of(rollout), total, objective, False, edits)

    whole, own, half = (advantages_at(share) for share in (0.0, 1.0, 0.5))
    assert torch.equal(
        whole.advantages, credit(drawn_of(rollout), total, ObjectiveConfig(), False).advantages
    )
    expected, asked_for = own_credit(edits, len(rollout.tokens))
    assert asked_for.any() and not asked_for.all()
    # The others keep their completion's.
    expected = torch.where(asked_for, expected / own.unit, whole.advantages)
    torch.testing.assert_close(own.advantages, expected)
    torch.testing.assert_close(half.advantages, (whole.advantages + own.advantages) / 2)
    assert own.advantages.any()


def test_equal_rewards_teach_where_another_token_would_have_changed_them(backbone, head):
    """Nothing was found by sampling, but one changed completion is paid: its group teaches, in finite numbers."""
    rollout = sample(backbone, head, stop=())
    found = Counterfactuals(torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([2.0, 0.0]))
    objective = ObjectiveConfig(counterfactuals=1)
    total = [0.0] * len(rollout.texts)
    first = credit(drawn_of(rollout), total, objective, True, found)
    assert first.groups == 1 and set(first.tokens.rows.tolist()) == set(range(8))
    assert first.unit == pytest.approx(math.sqrt(2.0))
    assert first.advantages[0].item() == pytest.approx(-0.5 * math.sqrt(2.0))
    assert not first.advantages[1:].any()
    nothing = credit(drawn_of(rollout), total, objective, True, found._replace(changes=torch.zeros(2)))
    assert nothing.groups == 0 and len(nothing.tokens) == len(rollout.tokens)
    assert nothing.unit == 0.0 and not nothing.advantages.any()


REWARD = """
def even(prompts, completions, **columns):
    return [sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text)) for text in completions]
"""


def recipe(tmp_path, *overrides):
    settings = {
        "model": {"name_or_path": str(save_tiny("llama", tmp_path / "model")), "dtype": "float32"},
        "head": {"hidden_sizes": [16], "shortlist_size": 24, "dropout": 0.1},
        "data": {"prompts": [f"prompt number {i}" for i in range(12)], "eval_fraction": 0},
        "rewards": [{"name": "rewards.py:even"}],
        "rollout": {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 6},
        "objective": {"name": "grpo", "counterfactuals": 3, "expected_gradient": 1.0},
        "train": {"max_steps": 4, "save_steps": 2, "learning_rate": 3e-3, "warmup_steps": 0, "num_threads": 1},
    }  # fmt: skip
    (tmp_path / "rewards.py").write_text(REWARD)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_recipe(str(path), list(overrides))


def head_of(path):
    return hashlib.sha256((path / "head" / "tea_head.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "settings", [[], ["rollout.reward_workers=1", "rollout.dynamic_sampling=1", "objective.replay_steps=1"]]
)
def test_resuming_is_exact(tmp_path, settings):
    which = recipe(tmp_path, *settings)
    train(which, tmp_path / "whole")
    stops = iter([False, False, True])
    train(which, tmp_path / "parts", should_stop=lambda: next(stops))
    train(which, tmp_path / "parts", resume=True)
    assert head_of(tmp_path / "whole") == head_of(tmp_path / "parts")


def test_it_teaches_by_itself(tmp_path):
    """Own credit alone, no completion's reward: the reward rises all the same."""
    own = [
        "objective.counterfactual_credit=1",
        "objective.expected_gradient=0",
        "objective.counterfactuals=6",
    ]
    which = recipe(tmp_path, *own, "train.max_steps=30", "anchor.conservativity=0")
    run = train(which, tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "loss" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_rewards_that_are_asked_are_counted(tmp_path):
    from tea_rl.training.online import OnlineTrainer
    from tea_rl.training.progress import Listener
    from tea_rl.training.run_directory import RunDirectory

    with RunDirectory.create(tmp_path / "run") as run:
        trainer = OnlineTrainer(recipe(tmp_path), run, Listener(), False)
        trainer._step(1)
        assert trainer.rewards_asked == 32 * (1 + 3)


@pytest.mark.parametrize("size", ["all", "auto"])
def test_a_shortlist_is_needed(tmp_path, size):
    with pytest.raises(TeaError, match=f"counterfactuals needs data.prompts and a number.* and {size};"):
        recipe(tmp_path, "objective.expected_gradient=0", f"head.shortlist_size={size}")
    with pytest.raises(TeaError, match="counterfactuals needs data.prompts"):
        load_recipe("guess-number", ["objective.counterfactuals=1"])
