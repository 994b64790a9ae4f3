"""Commands that play an environment: train, evaluate, rollout, inspect, and an episode of the base model."""

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


@pytest.mark.usefixtures("unrendered_pictures")
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


def test_evaluate_an_environment_by_id(capsys, run):
    args = ["evaluate", "--env", "EasyPick-v0", "--head", run / "head", "--set", "env.eval_starts=3"]
    code, out, err = tea(
        capsys, *args, "--set", "rollout.max_completion_length=3", "--strength", "0,1", "--json"
    )
    assert code == 0 and "3 starts" in err
    rows = json.loads(out)
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-6) and rows[1]["eval_kl"] > 1e-6
    assert rows[0]["eval_expert_reward"] == 1 and rows[0]["eval_turns"] == 2
    assert "give a recipe or --env ID" in last_error(tea(capsys, "evaluate", "--head", run / "head"))
    unknown = ["evaluate", "--env", "EasyPik-v0", "--head", run / "head", "--model", "/no/such/model"]
    assert "EasyPik-v0" in last_error(tea(capsys, *unknown))


def test_inspect_shows_transcripts(capsys, run):
    code, out, err = tea(capsys, "inspect", run)
    assert code == 0 and "aaa?" in out + "bbb?" + "ccc?" and "--row N" in err
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    code, out, _ = tea(capsys, "inspect", run, "--row", 1)
    assert code == 0 and re.search(r"^base, return [+-]\d\.\d{3} after 2 turns$", out, re.MULTILINE)
    shown = out.partition("\ntrained, return ")[2].splitlines()
    for turn in samples[1]["trained_episode"]["turns"]:
        (place,) = [n for n, line in enumerate(shown) if line.startswith(f"turn {turn['turn']}, reward ")]
        assert shown[place].endswith("invalid") == turn["invalid"]
        assert shown[place + 1] == f"  | {turn['observation']}"
        assert shown[place + 2].startswith("  > ")
    assert shown[-2] == "end"
    assert json.loads(tea(capsys, "inspect", run, "--row", 1, "--json")[1])[0]["base"] == samples[1]["base"]
    assert "--episode is for stores" in last_error(tea(capsys, "inspect", run, "--episode", 1))


def test_inspect_shows_no_control_characters(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    sample = {"step": 0, "prompt": "p", "base": "x\n\x1b[2Jy\n", "trained": "z", "base_reward": 0.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    code, out, _ = tea(capsys, "inspect", tmp_path, "--row", 0)
    assert code == 0 and "base:\n  | x\n  | \\x1b[2Jy\n" in out and "\x1b" not in out


def test_rollout_inspect_and_train_offline(capsys, recipe, tmp_path):
    store = tmp_path / "store"
    code, out, err = tea(capsys, "rollout", recipe, "--output", store, "--steps", 2)
    assert code == 0 and "32 rows" in out and "16/16 episodes" in err
    assert tea(capsys, "rollout", recipe, "--output", store, "--steps", 2)[0] == 0
    code, out, err = tea(capsys, "inspect", store)
    assert code == 0 and "episode" in out and "return" in out and "--episode N" in err
    rows = json.loads(tea(capsys, "inspect", store, "--json", "--limit", 40)[1])["rows"]
    assert len(rows) == 32 and rows[0]["prompt"] == rows[0]["columns"]["observation"]
    code, out, _ = tea(capsys, "inspect", store, "--episode", 3)
    lines = out.splitlines()
    assert code == 0 and re.match(
        r"episode 3 \(start \d, rows 6 to 7\), return \+\d\.\d{3} after 2 turns$", lines[0]
    )
    assert [line.split(",")[0] for line in lines if line.startswith("turn ")] == ["turn 0", "turn 1"]
    assert f"  | {rows[6]['columns']['observation']}" in lines and "end" in lines
    played = json.loads(tea(capsys, "inspect", store, "--episode", 3, "--json")[1])
    assert [turn["row"] for turn in played["turns"]] == [6, 7]
    assert played["turns"][0]["return"] == pytest.approx(sum(turn["reward"] for turn in played["turns"]))
    code, out, _ = tea(capsys, "inspect", store, "--row", 7)
    assert code == 0 and re.search(r"^turn: +1$", out, re.MULTILINE) and "position" in out
    assert "16 of the episodes 0 to 15" in last_error(tea(capsys, "inspect", store, "--episode", 99))
    settings = ["objective.name=cross_entropy", "train.max_steps=2", "env.id=null", f"data.store={store}"]
    sets = [part for text in settings for part in ("--set", text)]
    code, out, _ = tea(capsys, "train", recipe, *sets, "--output", tmp_path / "offline")
    assert code == 0 and "Held-out rows" in out


def test_rollout_of_an_environment_by_id(capsys, model, run, tmp_path):
    args = [
        "rollout",
        "--env",
        "EasyPick-v0",
        "--kwargs",
        "silent=true",
        "--set",
        "rollout.prompts_per_step=2",
    ]
    args += ["--set", "rollout.num_generations=2", "--set", "rollout.max_completion_length=3", "--steps", 1]
    name = ["--set", f"model.name_or_path={model}", "--set", "model.dtype=float32"]
    code, out, _ = tea(capsys, *args, *name, "--output", tmp_path / "base", "--json")
    assert code == 0 and json.loads(out)["rows"] == 8
    # A head brings its model and its own settings along.
    code, out, _ = tea(capsys, *args, "--head", run / "head", "--output", tmp_path / "head", "--json")
    made = json.loads(out)
    assert code == 0 and made["rows"] == 8 and made["keys"]["base_model_name_or_path"] == str(model)
    assert made["keys"]["shortlist_size"] == 32


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a recipe or --env ID"),
        (["quickstart", "--env", "EasyPick-v0"], "got both"),
        (["quickstart", "--kwargs", "a=1"], "--kwargs belongs to --env"),
        (["--env", "EasyPik-v0"], 'there is no environment "EasyPik-v0"'),
        (["--env", "EasyPick-v0", "--kwargs", "silnt=true"], "silnt"),
        (["--env", "EasyPick-v0", "--set", "env.choose_admissible=true"], "env.choose_admissible=false"),
        (["--env", "EasyPick-v0", "--set", "env.max_turn=3"], 'Did you mean "max_turns"'),
        (["--env", "EasyPick-v0", "--head", "no/such/head"], "no/such/head"),
    ],
)
def test_rollout_mistakes_are_one_line(capsys, tmp_path, args, words):
    assert words in last_error(tea(capsys, "rollout", *args, "--output", tmp_path / "store"))
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
