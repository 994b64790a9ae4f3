"""Getting more out of what is generated: earlier rollouts replayed, prompts that teach nothing replaced."""

import json
import math

import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.recipe import parse_recipe
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.learner import Learner
from tea_rl.training.replay import Replay
from tea_rl.training.seeding import other_prompts

REWARD = '''
def even(prompts, completions, **columns):
    """Even prompts teach nothing; the others are paid by the share of even code points."""
    return [
        0.0 if int(prompt[-1]) % 2 == 0 else sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text))
        for prompt, text in zip(prompts, completions)
    ]
'''


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    recipe = {
        "model": {"name_or_path": str(save_tiny("llama", tmp_path)), "dtype": "float32"},
        "head": {"num_members": 2, "hidden_sizes": [16], "shortlist_size": 32, "dropout": 0.1},
        "data": {"prompts": [f"prompt number {i}" for i in range(10)], "eval_fraction": 0},
        "rewards": [{"name": "rewards.py:even"}],
        "rollout": {"prompts_per_step": 4, "num_generations": 6, "max_completion_length": 6},
        "objective": {"minibatch_tokens": 48, "inner_epochs": 3},
        "train": {"max_steps": 5, "save_steps": 2, "learning_rate": 3e-3, "warmup_steps": 1},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def steps(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def updates_of(monkeypatch):
    """Tokens, advantages and number of replayed batches of every update, as it happens."""
    seen, update = [], Learner.update

    def spy(self, tokens, advantages, generator, token_values=None, replayed=()):
        seen.append((tokens, advantages, len(replayed)))
        return update(self, tokens, advantages, generator, token_values, replayed)

    monkeypatch.setattr(Learner, "update", spy)
    return seen


def test_prompts_that_teach_nothing_are_replaced(recipe_file, tmp_path, monkeypatch):
    seen = updates_of(monkeypatch)
    train(load_recipe(str(recipe_file), ["rollout.dynamic_sampling=3"]), tmp_path / "run")
    for row, (tokens, advantages, _) in zip(steps(tmp_path / "run"), seen, strict=True):
        # Half of the ten prompts teach: at most three draws beside the first find four of the five (or all there are).
        assert row["prompts_learnt"] <= 1.0 <= row["prompts_drawn"]
        assert row["prompts_learnt"] == 1.0 or row["prompts_drawn"] > 1.0
        rows = tokens.rows.unique()
        groups = len(rows) // 6
        assert len(rows) == 6 * groups and groups == round(4 * row["prompts_learnt"])
        for number in rows.split(6):
            own = torch.isin(tokens.rows, number)
            assert advantages[own].any()
    drawn = [row["prompts_drawn"] for row in steps(tmp_path / "run")]
    assert max(drawn) > 1.0
    train(load_recipe(str(recipe_file)), tmp_path / "plain")
    assert "prompts_drawn" not in steps(tmp_path / "plain")[0]
    # The reward that is logged is that of the step's own prompts, or it would look better than it is.
    assert steps(tmp_path / "plain")[0]["reward"] == steps(tmp_path / "run")[0]["reward"]


def test_where_nothing_teaches_the_step_is_as_without(recipe_file, tmp_path):
    settings = ["data.prompts=[a 0, b 2, c 4, d 6, e 8]", "rollout.dynamic_sampling=2", "train.max_steps=1"]
    train(load_recipe(str(recipe_file), settings), tmp_path / "run")
    row = steps(tmp_path / "run")[0]
    assert (
        row["prompts_learnt"] == 0.0 and row["prompts_drawn"] == 1.25
    )  # the fifth prompt is the only other one


def test_replayed_steps_are_learnt_from_again(recipe_file, tmp_path, monkeypatch):
    seen = updates_of(monkeypatch)
    train(load_recipe(str(recipe_file), ["objective.replay_steps=2"]), tmp_path / "run")
    assert [count for *_, count in seen] == [0, 1, 2, 2, 2]
    train(load_recipe(str(recipe_file)), tmp_path / "plain")
    with_replay, plain = steps(tmp_path / "run"), steps(tmp_path / "plain")
    assert with_replay[0]["loss"] == plain[0]["loss"] and with_replay[1]["loss"] != plain[1]["loss"]


def test_only_the_least_sure_tokens_are_learnt_from(recipe_file, tmp_path, monkeypatch):
    seen = updates_of(monkeypatch)
    settings = ["objective.replay_steps=1", "train.max_steps=2"]
    train(load_recipe(str(recipe_file), settings), tmp_path / "all")
    train(load_recipe(str(recipe_file), [*settings, "objective.top_entropy_quantile=0.3"]), tmp_path / "some")
    (whole, credit, _), _, (kept, kept_credit, _), _ = seen
    assert len(kept) == math.ceil(0.3 * len(whole)) and kept.entropy.min() >= whole.entropy.quantile(0.65)
    # The first rollout is the same one; what is kept of it is whole tokens in their order.
    places, wanted = (tokens.rows * 100 + tokens.positions for tokens in (whole, kept))
    at = torch.isin(places, wanted).nonzero().squeeze(1)
    assert torch.equal(whole.states[at], kept.states) and torch.equal(credit[at], kept_credit)
    assert [count for *_, count in seen] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "settings",
    [
        ["objective.replay_steps=2", "objective.top_entropy_quantile=0.4", "objective.entropy_coef=-0.05"],
        ["objective.replay_steps=2"],
        ["rollout.dynamic_sampling=2", "objective.replay_steps=1", "rollout.reward_workers=1"],
    ],
)
def test_resuming_is_exact(recipe_file, tmp_path, settings):
    recipe = load_recipe(str(recipe_file), settings)
    train(recipe, tmp_path / "whole")
    asked = []
    train(recipe, tmp_path / "parts", should_stop=lambda: asked.append(1) or len(asked) == 4)
    train(recipe, tmp_path / "parts", resume=True)
    heads = [(tmp_path / name / "head" / "tea_head.safetensors").read_bytes() for name in ("whole", "parts")]
    assert heads[0] == heads[1]


def test_replay_keeps_what_it_was_given(tmp_path):
    def batch(count, offset):
        numbers = torch.arange(count)
        parts = [torch.rand(count) for _ in range(5)]
        return TokenBatch(
            torch.rand(count, 3), None, numbers, numbers, *parts, numbers + offset, numbers // 2, numbers
        )

    replay = Replay(2)
    for count in (2, 3, 4):
        replay.add(batch(count, 7), torch.full((count,), float(count)))
    replay.save(tmp_path)
    again = Replay(2)
    again.load(tmp_path, torch.device("cpu"))
    assert [len(tokens) for tokens, _ in again.batches] == [3, 4]
    for (tokens, advantages), (mine, own) in zip(again.batches, replay.batches, strict=True):
        assert torch.equal(advantages, own)
        assert all(torch.equal(value, mine.tensors()[name]) for name, value in tokens.tensors().items())
    joined = TokenBatch.join([tokens for tokens, _ in again.batches])
    # Nothing of one is taken for something of the other.
    assert len(joined.state_ids.unique()) == 7 and len(joined.rows.unique()) == 4
    nothing = Replay(0)
    nothing.add(*replay.batches[0])
    nothing.save(tmp_path / "missing")
    assert not nothing.batches


def test_settings_that_make_no_sense_are_refused():
    online = {"data": {"prompts": ["a", "b"]}, "rewards": [{"name": "length", "kwargs": {"max": 3}}]}
    for objective in ({"name": "reinforce"}, {"name": "grpo", "scale_rewards": "batch"}):
        with pytest.raises(TeaError, match="dynamic_sampling leaves prompts out"):
            parse_recipe({**online, "objective": objective, "rollout": {"dynamic_sampling": 2}})
    with pytest.raises(TeaError, match=r"objective\.replay_steps .* needs data\.prompts, got env\.id"):
        parse_recipe({"env": {"id": "tea_rl/Bandit-v0"}, "objective": {"replay_steps": 1}})
    stored = {"data": {"store": "somewhere"}, "objective": {"name": "awr", "top_entropy_quantile": 0.5}}
    with pytest.raises(
        TeaError, match=r"top_entropy_quantile .* needs data\.prompts or env\.id, got data\.store"
    ):
        parse_recipe(stored)


def test_a_run_from_before_a_setting_existed_is_resumed(recipe_file, tmp_path):
    recipe = load_recipe(str(recipe_file))
    train(recipe, tmp_path / "whole")
    asked = []
    train(recipe, tmp_path / "old", should_stop=lambda: asked.append(1) or len(asked) == 3)
    path = tmp_path / "old" / "recipe.yaml"
    known = yaml.safe_load(path.read_text())
    del known["objective"]["replay_steps"], known["rollout"]["reward_workers"], known["model"]["compile"]
    path.write_text(yaml.safe_dump(known))
    train(recipe, tmp_path / "old", resume=True)
    heads = [(tmp_path / name / "head" / "tea_head.safetensors").read_bytes() for name in ("whole", "old")]
    assert heads[0] == heads[1]
    with pytest.raises(TeaError, match=r"objective\.replay_steps \(0 then, 2 now\)"):
        train(load_recipe(str(recipe_file), ["objective.replay_steps=2"]), tmp_path / "old", resume=True)


def test_other_prompts_are_other_prompts():
    found = other_prompts(3, 5, 1, 10, {1, 2, 3}, 4)
    assert len(set(found)) == 4 and not {1, 2, 3} & set(found) and set(found) <= set(range(10))
    assert found == other_prompts(3, 5, 1, 10, {1, 2, 3}, 4) != other_prompts(3, 5, 2, 10, {1, 2, 3}, 4)
    assert len(other_prompts(3, 5, 1, 10, {1, 2, 3}, 40)) == 7
    assert other_prompts(3, 5, 1, 10, set(), 0) == other_prompts(3, 5, 1, 3, {0, 1, 2}, 4) == []


EARLY = ["rollout.early_steps=2", "rollout.early_completion_length=3"]


def test_early_completions_are_short_and_evaluations_are_not(recipe_file):
    result = train(
        load_recipe(str(recipe_file), [*EARLY, "data.eval_fraction=0.2", "train.eval_steps=1"]),
        recipe_file.parent / "run",
    )
    lengths = [row["completion_length"] for row in steps(result.path)]
    assert max(lengths[:2]) <= 3 < min(lengths[2:])
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert min(row["eval_completion_length"] for row in rows if "eval_completion_length" in row) > 3


@pytest.mark.parametrize("more", [[], ["rollout.reward_workers=1"]])
def test_a_run_stopped_where_completions_lengthen_goes_on_as_if_it_had_not(recipe_file, more):
    path, folder = str(recipe_file), recipe_file.parent
    changes = ["train.max_steps=4", *EARLY, *more]
    train(load_recipe(path, changes), folder / "whole")
    asked = iter([False, True])
    train(load_recipe(path, changes), folder / "cut", should_stop=lambda: next(asked))
    train(load_recipe(path, changes), folder / "cut", resume=True)
    whole, cut = ((folder / name / "head" / "tea_head.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_early_completions_are_never_longer_than_the_others(recipe_file):
    path, more = str(recipe_file), ["rollout.early_steps=2", "train.max_steps=2"]
    for name, changes in (("early", [*more, "rollout.early_completion_length=9"]), ("plain", more[1:])):
        train(load_recipe(path, changes), recipe_file.parent / name)
    early, plain = (
        (recipe_file.parent / name / "head" / "tea_head.safetensors").read_bytes()
        for name in ("early", "plain")
    )
    assert early == plain


def test_early_completions_are_those_of_prompts():
    with pytest.raises(TeaError, match="rollout.early_steps is for completions of prompts"):
        load_recipe("guess-number", [EARLY[0]])
