"""Commands on recipes that play an environment: train, evaluate, inspect, rollout, and an episode of the base model."""

import json
import re

import easy_envs  # noqa: F401 - registers the environments
import pytest
import yaml
from command_line import last_error, tea
from tiny import save_tiny

from tea_rl.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recipe(model, tmp_path_factory):
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [16], "shortlist_size": 32},
        "env": {"id": "EasyPick-v0", "num_starts": 6, "eval_starts": 4, "expert": {"episodes": 2}},
        "rollout": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 4},
        "train": {"max_steps": 2, "eval_steps": 2, "sample_prompts": 2},
    }
    path = tmp_path_factory.mktemp("recipe") / "pick.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "done"
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(recipe), "--output", str(path)])
    assert exit_.value.code == 0
    return path


def test_train_tells_of_episodes(capsys, recipe, tmp_path):
    code, out, err = tea(capsys, "train", recipe, "--output", tmp_path / "run")
    assert code == 0
    lines = err.splitlines()
    (base,) = [line for line in lines if line.startswith("held-out, base model:")]
    figures = r"return [+-]\d\.\d{3} sampled, [+-]\d\.\d{3} greedy, \d\.\d turns, invalid \d+%, KL \d\.\d{3}"
    assert re.search(
        figures + r" \(beside it: best constant answer \+.*, random \+.*, expert \+1\.000\)$", base
    )
    assert any(re.search(f"^held-out, after imitation: {figures}$", line) for line in lines)
    assert any(re.search(f"^held-out, step 2: {figures}$", line) for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2
    assert re.search(r"return [+-]\d.*  \d\.\d turns  invalid \d+%  KL \d\.\d+  \d+ tokens/s", steps[0])
    assert "nan" not in err and "failed" not in err
    assert "Held-out episodes" in out and f"tea-rl evaluate {tmp_path / 'run' / 'recipe.yaml'}" in out


def test_train_says_what_failed_and_prints_no_nan(capsys, recipe, tmp_path):
    settings = ["--set", "env.id=EasyFlaky-v0", "--set", "env.expert.episodes=0"]
    settings += ["--set", "env.kwargs={broken: 3}", "--set", "rollout.prompts_per_step=6"]
    code, _, err = tea(capsys, "train", recipe, "--output", tmp_path / "run", *settings)
    assert code == 0
    assert re.search(r"step 1/2  return .* episodes failed 50%", err)
    assert "nan" not in err and "beside it" not in err
    # Nothing of the held-out starts could be measured; the run then ends with its first step.
    settings[-3] = "env.kwargs={broken: 1000}"
    result = tea(capsys, "train", recipe, "--output", tmp_path / "none", *settings)
    assert "every episode" in last_error(result)
    assert "held-out, base model: episodes failed 100%" in result[2] and "nan" not in result[2]


def test_evaluate_plays_the_held_out_starts(capsys, run, recipe):
    args = ["evaluate", recipe, "--head", run / "head"]
    code, out, err = tea(capsys, *args, "--strength", "0,1", "--json")
    assert code == 0 and "4 starts" in err
    rows = json.loads(out)
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-6) and rows[1]["eval_kl"] > 1e-6
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in recorded if "eval_reward" in row]
    for row, before in ((rows[0], evaluations[0]), (rows[1], evaluations[-1])):
        assert row["eval_reward"] == pytest.approx(before["eval_reward"])
        assert row["eval_reward_greedy"] == pytest.approx(before["eval_reward_greedy"])
        for name in ("constant", "random", "expert"):
            assert row[f"eval_{name}_reward"] == evaluations[0][f"eval_{name}_reward"]
    code, out, _ = tea(capsys, *args, "--num-generations", "2")
    assert code == 0 and "nan" not in out
    title, reward = (
        next(line for line in out.splitlines() if word in line) for word in ("metric", "eval_reward ")
    )
    assert title.split() == ["metric", "strength", "0", "strength", "1", "constant", "random", "expert"]
    assert len(reward.split()) == 6 and reward.split()[-1] == "1.000"


def test_evaluate_refuses_before_the_model_is_loaded(capsys, run, recipe):
    args = ["evaluate", recipe, "--head", run / "head", "--model", "/no/such/model", "--set"]
    assert "env.eval_starts" in last_error(tea(capsys, *args, "env.eval_starts=0"))
    assert "EasyPik" in last_error(tea(capsys, *args, "env.id=EasyPik-v0"))
    assert "/no/such/model" in last_error(tea(capsys, *args, "env.eval_starts=2"))


def test_inspect_shows_transcripts(capsys, run):
    code, out, err = tea(capsys, "inspect", run)
    assert code == 0 and "aaa?" in out + "bbb?" + "ccc?" and "--row N" in err
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    code, out, _ = tea(capsys, "inspect", run, "--row", 1)
    assert code == 0 and "trained_reward:" in out
    shown = out.partition("trained:\n")[2]
    told = [line for line in samples[1]["trained"].splitlines() if line.endswith("?")]
    assert told and all(f"  | {line}" in shown.splitlines() for line in told)
    assert json.loads(tea(capsys, "inspect", run, "--row", 1, "--json")[1])[0]["base"] == samples[1]["base"]


def test_inspect_shows_no_control_characters(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    sample = {"step": 0, "prompt": "p", "base": "x\n\x1b[2Jy\n", "trained": "z", "base_reward": 0.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    code, out, _ = tea(capsys, "inspect", tmp_path, "--row", 0)
    assert code == 0 and "base:\n  | x\n  | \\x1b[2Jy\n" in out and "\x1b" not in out


def test_rollout_refuses_environments(capsys, recipe, tmp_path):
    error = last_error(tea(capsys, "rollout", recipe, "--output", tmp_path / "store"))
    assert "EasyPick-v0" in error and "tea-rl train" in error
    assert not (tmp_path / "store").exists()


def test_the_base_model_plays(capsys, model):
    args = ["envs", "EasyPick-v0", "--episodes", "3", "--play-base", "--model", model]
    code, out, _ = tea(capsys, *args)
    assert code == 0 and "checks: all passed" in out
    played = out.partition("an episode of ")[2]
    assert played.count("?\n") == 3 and played.count("\n>>> ") >= 2
    assert re.search(r"return \S+ after 2 turns$", played.strip())
    episode = json.loads(tea(capsys, *args, "--json")[1])["episode"]
    assert len(episode["turns"]) == 2 and episode["failed"] is None
    assert episode["return"] == sum(turn["reward"] for turn in episode["turns"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["EasyPick-v0", "--model", "x"], "--play-base"),
        (["--play-base"], "name one"),
        (["EasyPick-v0", "--episodes", "2", "--play-base", "--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_mistakes_with_the_base_model_are_one_line(capsys, args, words):
    assert words in last_error(tea(capsys, "envs", *args))
