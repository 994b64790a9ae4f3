"""A run ends where the reward is being hacked: each condition by itself, and a whole run."""

import json

import pytest
from tiny import save_tiny

from tea_rl.errors import TeaError
from tea_rl.recipe import parse_recipe
from tea_rl.recipe_groups import StopConfig
from tea_rl.training.guard import reason_to_stop
from tea_rl.training.online import train
from tea_rl.training.progress import Listener

BASE = {"eval_kl": 0.0, "eval_distinct_2": 0.8, "eval_base_nll": 3.0}
HACKED = {"eval_kl": 0.9, "eval_distinct_2": 0.3, "eval_base_nll": 4.0}


@pytest.mark.parametrize(
    "stop, expected",
    [
        ({}, None),
        ({"kl": 1.0, "distinct_2": 0.3, "base_nll": 0.5}, None),
        ({"kl": 0.8}, "KL 0.900 is above train.stop_when.kl 0.8"),
        ({"distinct_2": 0.5}, "distinct bigrams fell from 0.80 to 0.30"),
        ({"base_nll": 0.3}, "surprise under the original model rose from 3.00 to 4.00"),
    ],
)
def test_each_condition_is_met_by_its_own_figure(stop, expected):
    reason = reason_to_stop(StopConfig(**stop), HACKED, BASE)
    assert reason is None if expected is None else expected in reason
    assert reason_to_stop(StopConfig(**stop), BASE, BASE) is None


def test_what_was_not_measured_meets_nothing():
    every = StopConfig(kl=0.1, distinct_2=0.9, base_nll=0.1)
    assert reason_to_stop(every, {"eval_reward": 1.0}, {}) is None
    assert reason_to_stop(every, {"eval_distinct_2": float("nan")}, BASE) is None


class Notes(Listener):
    def __init__(self):
        self.notes = []

    def on_note(self, text):
        self.notes.append(text)


def test_a_run_ends_at_its_limit_and_stays_ended(tmp_path):
    model = save_tiny("llama", tmp_path)
    (tmp_path / "reward.py").write_text(
        "def long(prompts, completions, **_):\n    return [len(c) for c in completions]\n"
    )
    raw = {
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "head": {"num_members": 1, "hidden_sizes": [8], "shortlist_size": 16},
        "data": {"prompts": [f"word {letter}" for letter in "abcdefgh"]},
        "rewards": [{"name": "reward.py:long"}],
        "rollout": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 6},
        "train": {"max_steps": 5, "eval_steps": 2, "warmup_steps": 0, "stop_when": {"kl": 1e-9}},
    }
    recipe = parse_recipe(raw, "guarded", tmp_path)
    heard = Notes()
    result = train(recipe, tmp_path / "run", listener=heard)
    assert result.step == 2 and not result.stopped
    assert any("stopped after step 2: KL" in note for note in heard.notes)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "stopped" in row] == [2]
    assert (tmp_path / "run" / "head").is_dir() and (tmp_path / "run" / "checkpoints" / "step-2").is_dir()
    assert train(recipe, tmp_path / "run", resume=True).step == 2
    with pytest.raises(TeaError, match="stop_when.kl: expected a number above 0"):
        parse_recipe({**raw, "train": {"stop_when": {"kl": 0}}}, "guarded", tmp_path)
