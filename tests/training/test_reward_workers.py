"""Rewards in processes of their own: the next batch is generated meanwhile, a hung call costs its rows, resuming is exact."""

import json
import math

import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.objectives.advantages import advantages, known_advantages
from tea_rl.recipe import parse_recipe
from tea_rl.training.online import OnlineTrainer

REWARD = '''
import random, time
from pathlib import Path

def even(prompts, completions, **columns):
    """Share of characters with an even code point, and a little chance."""
    return [
        sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text)) + random.random() / 100
        for text in completions
    ]

def sometimes(prompts, completions, **columns):
    """Hangs on the prompt that ends in 3."""
    if any(prompt.endswith("3") for prompt in prompts):
        time.sleep(3600)
    return [float(len(text)) for text in completions]

def never(prompts, completions, **columns):
    time.sleep(3600)
'''


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    recipe = {
        "model": {"name_or_path": str(save_tiny("llama", tmp_path)), "dtype": "float32"},
        "head": {"num_members": 2, "hidden_sizes": [16], "shortlist_size": 32, "dropout": 0.1},
        "data": {"prompts": [f"prompt number {i}" for i in range(8)]},
        "rewards": [{"name": "rewards.py:even", "weight": 10}],
        "rollout": {
            "prompts_per_step": 3, "num_generations": 4, "max_completion_length": 6, "reward_workers": 2,
        },
        "train": {"max_steps": 5, "save_steps": 2, "eval_steps": 5, "learning_rate": 3e-3, "warmup_steps": 1},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_first_step_is_that_without_workers(recipe_file, tmp_path):
    """Only from the second step on is the policy that sampled one update behind."""
    recipe_file.write_text(recipe_file.read_text().replace("rewards.py:even", "length"))
    settings = ["train.max_steps=3", "rewards=[{name: length, kwargs: {max: 3}}]"]
    for name, workers in (("with", 2), ("without", 0)):
        recipe = load_recipe(str(recipe_file), [*settings, f"rollout.reward_workers={workers}"])
        train(recipe, tmp_path / name)
    ours, plain = ([row for row in rows(tmp_path / name) if "reward" in row] for name in ("with", "without"))
    assert ours[0]["loss"] == plain[0]["loss"] and ours[0]["reward"] == plain[0]["reward"]
    # Sampled before the first update, so from the original model still.
    assert ours[1]["kl"] == 0.0 < plain[1]["kl"]
    assert ours[2]["kl"] > 0.0
    assert [row["unscored"] for row in ours] == [0, 0, 0] and "unscored" not in plain[0]


def test_stopping_and_resuming_is_exact(recipe_file, tmp_path):
    """The batch that was generated ahead is part of the checkpoint: the head it was sampled from is gone."""
    recipe = load_recipe(str(recipe_file))
    train(recipe, tmp_path / "whole")
    asked = []
    train(recipe, tmp_path / "parts", should_stop=lambda: asked.append(1) or len(asked) == 4)
    train(recipe, tmp_path / "parts", resume=True)
    heads = [(tmp_path / name / "head" / "tea_head.safetensors").read_bytes() for name in ("whole", "parts")]
    assert heads[0] == heads[1]
    losses = [[row.get("loss") for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_more_steps_are_refused_on_resume(recipe_file, tmp_path):
    train(load_recipe(str(recipe_file), ["train.max_steps=1"]), tmp_path / "run")
    with pytest.raises(TeaError, match=r"train\.max_steps"):
        train(load_recipe(str(recipe_file), ["train.max_steps=2"]), tmp_path / "run", resume=True)


def test_a_hung_call_costs_its_completions_only(recipe_file, tmp_path):
    settings = [
        f"rewards=[{{name: '{tmp_path}/rewards.py:sometimes'}}]", "rollout.reward_timeout=2", "rollout.prompts_per_step=6",
        "rollout.reward_workers=6", "train.max_steps=1", "data.eval_fraction=0",
    ]  # fmt: skip
    train(load_recipe(str(recipe_file), settings), tmp_path / "run")
    step = next(row for row in rows(tmp_path / "run") if "reward" in row)
    assert step["unscored"] == 4
    assert math.isfinite(step["reward"]) and math.isfinite(step["loss"])


def test_no_answer_at_all_ends_the_run(recipe_file, tmp_path):
    settings = [
        f"rewards=[{{name: '{tmp_path}/rewards.py:never'}}]",
        "rollout.reward_timeout=0.5",
        "data.eval_fraction=0",
    ]
    with pytest.raises(TeaError, match="3 times in a row.*reward_timeout"):
        train(load_recipe(str(recipe_file), settings), tmp_path / "run")
    # The two steps before that taught nothing and broke nothing.
    lost = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert [row["unscored"] for row in lost] == [12, 12] and [row["loss"] for row in lost] == [0.0, 0.0]


def test_workers_end_with_the_run(recipe_file, tmp_path, monkeypatch):
    made = []
    begin = OnlineTrainer._start_workers
    monkeypatch.setattr(OnlineTrainer, "_start_workers", lambda self: made.append(begin(self)) or made[-1])
    train(load_recipe(str(recipe_file), ["train.max_steps=1", "data.eval_fraction=0"]), tmp_path / "run")
    with pytest.raises(RuntimeError):
        made[0].submit(["a"], ["b"])


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce", "ppo"])
def test_unknown_rewards_have_no_advantage_and_change_none(name):
    whole, lost = torch.tensor([[10.0, 11.0], [9.0, 10.0]]), torch.full((2, 2), torch.nan)
    for scale in ("group", "batch", "none"):
        found, unequal = known_advantages(name, torch.cat([whole, lost]), scale)
        assert torch.equal(found[:2], advantages(name, whole, scale)) and not found[2:].any()
        assert unequal.tolist() == [True, True, False, False]
    # One beside known ones is as good as their mean, and three that are equal are equal, whatever rounding says.
    found, unequal = known_advantages(
        name, torch.tensor([[0.1, 0.1, torch.nan, 0.1], [1.0, 2.0, torch.nan, 3.0]])
    )
    assert unequal.tolist() == [False, True] and not found[:, 2].any() and found.isfinite().all()
    assert not known_advantages(name, lost)[0].any()


def test_settings_that_make_no_sense_are_refused():
    online = {"data": {"prompts": ["a", "b"]}, "rewards": [{"name": "length", "kwargs": {"max": 3}}]}
    with pytest.raises(TeaError, match="reward_workers of at least 1"):
        parse_recipe({**online, "rollout": {"reward_timeout": 3}})
    with pytest.raises(TeaError, match=r"needs data\.prompts, got env\.id"):
        parse_recipe({"env": {"id": "tea_rl/Bandit-v0"}, "rollout": {"reward_workers": 1}})
