"""The command line as a user meets it: helps, errors in one line with exit code 2, and whole commands on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import last_error, tea
from tiny import save_tiny

from tea_rl.cli import app, main
from tea_rl.recipe import shipped_recipes

COMMANDS = [
    "train", "recipes", "generate", "chat", "evaluate", "doctor", "embed", "rollout", "inspect", "relabel", "sweep",
    "envs", "play", "compare", "report",
]  # fmt: skip
ROOT = Path(__file__).parents[1]


def assert_one_line_error(result, *words):
    last = last_error(result)
    for word in words:
        assert word in last, last


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recipe(model, tmp_path_factory):
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [16], "shortlist_size": 32},
        "data": {"prompts": [f"prompt number {i}" for i in range(8)]},
        "rewards": [{"name": "length", "kwargs": {"max": 1}}],
        "rollout": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 6},
        "train": {"max_steps": 2, "eval_steps": 2, "sample_prompts": 2},
    }
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "done"
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(recipe), "--output", str(path)])
    assert exit_.value.code == 0
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    code, out, _ = tea(capsys, command, "--help")
    assert code == 0 and "Example" in out


def test_help_loads_nothing_heavy():
    """The help answers at once because torch and friends stay out (how fast: benchmarks)."""
    code = (
        "import sys\nfrom tea_rl.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"


def test_all_commands_are_tested():
    assert sorted(command.name for command in app.registered_commands) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_print(capsys, name):
    """Invariant 8: every shipped recipe parses; what is printed parses again."""
    code, out, _ = tea(capsys, "recipes", name)
    assert code == 0 and yaml.safe_load(out)["name"] == name


def test_recipes_list_and_schema(capsys):
    code, out, _ = tea(capsys, "recipes")
    assert code == 0 and "quickstart" in out and "arithmetic" in out
    code, out, _ = tea(capsys, "recipes", "--schema")
    assert code == 0 and "conservativity" in out


def test_generate_compares_and_sweeps_strength(capsys, run):
    args = ["generate", "--head", run / "head", "--prompt", "Hello", "--max-new-tokens", "5"]
    code, out, _ = tea(capsys, *args)
    assert code == 0 and out.startswith("Hello")
    code, out, _ = tea(capsys, *args, "--compare")
    assert [line.split("|")[0].strip() for line in out.splitlines() if " | Hello" in line] == [
        "base",
        "trained",
    ]
    code, out, _ = tea(capsys, *args, "--strength", "0,0.5,1", "--json", "--num-generations", "2")
    rows = json.loads(out)["completions"]
    assert [row["strength"] for row in rows] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert rows[0]["logp_gain_per_token"] == 0.0 != rows[-1]["logp_gain_per_token"]


def test_evaluate(capsys, run, recipe):
    code, out, _ = tea(capsys, "evaluate", recipe, "--head", run / "head", "--strength", "0,1", "--json")
    rows = json.loads(out)
    assert code == 0 and rows[0]["eval_kl"] == 0.0 < rows[1]["eval_kl"]
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in recorded if "eval_reward" in row][-1]
    assert rows[1]["eval_reward"] == pytest.approx(last["eval_reward"])  # the saved head is the trained one
    code, out, _ = tea(capsys, "evaluate", recipe, "--head", run / "head")
    assert code == 0 and "eval_reward_greedy" in out


def test_chat_answers_and_takes_commands(capsys, run, monkeypatch):
    lines = iter(["hello there", "/strength 0.5", "/strength much", "/nonsense", "/reset", "again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = tea(
        capsys, "chat", "--head", run / "head", "--max-new-tokens", "4", "--temperature", "0"
    )
    assert code == 0
    assert "strength 0.5" in err and "no command /nonsense" in err and "--strength takes numbers" in err


def test_doctor_names_what_it_found(capsys, model):
    code, out, _ = tea(capsys, "doctor", "--model", model)
    assert code == 0, out
    for word in ("torch", "device", "dtype", "end of sequence", "padding", "output layer", "free disk"):
        assert word in out
    code, out, _ = tea(capsys, "doctor", "--model", model.parent / "absent", "--json")
    assert code == 1
    assert [row["status"] for row in json.loads(out) if row["check"] == "model"] == ["error"]


def test_mistyped_things_get_one_line(capsys, recipe, run, tmp_path):
    head = run / "head"
    cases = [
        (["trian"], ["train"]),
        (["train"], ["recipe"]),
        (["train", "quikstart"], ["quickstart"]),
        (["train", tmp_path / "no.yaml"], ["no.yaml"]),
        (["train", recipe, "--set", "train.learing_rate=1"], ["learning_rate"]),
        (["train", recipe, "--set", "trian.learning_rate=1"], ["train"]),
        (["train", recipe, "--set", "train.max_steps=many"], ["train.max_steps"]),
        (["train", recipe, "--set", "train.max_steps"], ["="]),
        (["train", recipe, "--set", "head.train_reference=true"], ["conservativity"]),
        (["train", recipe, "--set", "rollout.num_generations=1"], ["num_generations"]),
        (["train", recipe, "--set", "rollout.top_p=0.9"], ["top_p"]),
        (["train", recipe, "--set", "rollout.top_k=50"], ["top_k"]),
        (["train", recipe, "--resume"], ["--output"]),
        (["train", recipe, "--resume", "--output", tmp_path / "nothing"], ["nothing"]),
        (["train", recipe, "--output", run], ["--resume"]),
        (["train", recipe, "--outptu", run], ["--output"]),
        (["train", recipe, "--set", "model.name_or_path=/no/such/model"], ["/no/such/model"]),
        (["train", recipe, "--set", "model.name_or_path=nobody/nothing"], ["nobody/nothing"]),
        (["train", recipe, "--set", "model.device=cuda"], ["cuda"]),
        (["train", recipe, "--set", "data.prompts=absent.txt"], ["absent.txt"]),
        (["train", recipe, "--set", "head.shortlist_size=320"], ["shortlist_size"]),
        (["train", recipe, "--set", "rewards.0.name=sentimnt"], ["sentiment"]),
        (["train", recipe, "--set", "rewards.0.name=absent.py:f"], ["absent.py"]),
        (["generate", "--head", tmp_path, "--prompt", "x"], ["tea_config.json"]),
        (["generate", "--head", run, "--prompt", "x"], ["head"]),
        (["generate", "--head", head, "--prompt", "x", "--strength", "high"], ["--strength"]),
        (["generate", "--head", head, "--prompt", "x", "--max-new-tokens", "1000"], ["--max-new-tokens"]),
        (["generate", "--head", head], ["--prompt"]),
        (["evaluate", recipe], ["--head"]),
        (["evaluate", recipe, "--head", tmp_path / "none"], ["none"]),
        (["recipes", "arithmetics"], ["arithmetic"]),
    ]
    for args, words in cases:
        assert_one_line_error(tea(capsys, *args), *words)


def test_head_of_another_base_model_is_refused(capsys, run, tmp_path):
    other = save_tiny("llama", tmp_path, seed=9)
    assert_one_line_error(
        tea(capsys, "generate", "--head", run / "head", "--prompt", "x", "--model", other), "reference digest"
    )


def test_empty_prompt_file(capsys, recipe, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_one_line_error(
        tea(capsys, "train", recipe, "--set", f"data.prompts={tmp_path / 'empty.txt'}"), "empty.txt"
    )


def test_ctrl_c_saves_and_resume_finishes(recipe, tmp_path):
    """A real process, a real signal."""
    output = tmp_path / "run"
    base = [sys.executable, "-m", "tea_rl.cli", "train", str(recipe), "--output", str(output)]
    command = [*base, "--set", "train.max_steps=2000", "--set", "train.eval_steps=2000"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and '"reward"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    step = int(re.search(r"stopped after step (\d+)", err)[1])
    assert (output / "checkpoints" / f"step-{step}").is_dir()
    hint = re.search(r"tea-rl (train .*)", err)[1].split()
    resumed = subprocess.run(
        [sys.executable, "-m", "tea_rl.cli", *hint, "--set", f"train.max_steps={step + 1}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr and (output / "head").is_dir()


def test_output_in_use_is_refused(capsys, recipe, tmp_path):
    from tea_rl.training.run_directory import RunDirectory

    with RunDirectory.create(tmp_path / "busy"):
        assert_one_line_error(tea(capsys, "train", recipe, "--output", tmp_path / "busy", "--resume"), "busy")


def test_launcher_is_the_same_program():
    out = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert out.startswith("tea-rl ")
