"""Invariant 7: ``kill -9`` at random moments of ``tea-rl train``, a save included, then ``--resume``: the same bytes."""

import hashlib
import os
import random
import subprocess
import sys
import time

import pytest
import yaml
from tiny import save_tiny

KILLS = 12
STEPS = 40  # more than the kills let pass


def command(recipe, output, *options):
    return [sys.executable, "-m", "tea_rl.cli", "train", str(recipe), "--output", str(output), *options]


def run(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=600, check=False)


def digest(output):
    return hashlib.sha256((output / "head" / "tea_head.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def recipe(tmp_path):
    model = save_tiny("llama", tmp_path)
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        # A head large enough that writing it takes part of the time, saved at every step.
        "head": {
            "num_members": 8,
            "hidden_sizes": [256, 256],
            "shortlist_size": 32,
            "dropout": 0.1,
            "member_dropout": 0.2,
        },
        "data": {"prompts": [f"prompt number {i}" for i in range(12)]},
        "rewards": [{"name": "length", "kwargs": {"max": 1}}],
        "objective": {"replay_steps": 1},
        "rollout": {
            "prompts_per_step": 3,
            "num_generations": 4,
            "max_completion_length": 6,
            "reward_workers": 1,
        },  # fmt: skip
        "train": {"max_steps": STEPS, "save_steps": 1, "eval_steps": 10, "num_threads": 1},
    }
    path = tmp_path / "kill.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_killed_at_random_moments(recipe, tmp_path):
    whole = tmp_path / "whole"
    result = run(recipe, whole)
    assert result.returncode == 0, result.stderr

    rng = random.Random(0)
    saving, output = 0, tmp_path / "killed"
    # Moments are counted in the run's own progress where they can be: how fast the machine is must not decide
    # whether the run outlives its kills.
    for kill in range(KILLS):
        options = ["--resume"] if output.exists() else []
        process = subprocess.Popen(
            command(recipe, output, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kill % 3 == 0:
            time.sleep(rng.uniform(0.1, 1.0))  # imports and loading
        elif kill % 3 == 1:
            _wait_for_steps(process, output, rng.randint(1, 2))
            time.sleep(rng.uniform(0.0, 0.03))
        else:
            saving += _wait_for_a_save(process, output)  # dies with a checkpoint half written
        assert process.poll() is None, f"the run ended before kill {kill + 1}: give it more steps"
        process.kill()
        process.wait()
    assert saving >= 1, "no kill hit a save: make the head larger"
    final = run(recipe, output, "--resume")
    assert final.returncode == 0, final.stderr
    assert digest(output) == digest(whole)
    steps = [
        line.split(",")[0]
        for line in (output / "metrics.jsonl").read_text().splitlines()
        if '"reward"' in line
    ]
    assert steps == [f'{{"step": {step}' for step in range(1, STEPS + 1)]
    assert not [name for name in os.listdir(output / "checkpoints") if name.startswith(".tmp")]


def _lines(output) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _wait_for_steps(process, output, count: int) -> None:
    """Return once ``count`` more lines of metrics are written, the process ends or a minute has passed."""
    deadline, wanted = time.monotonic() + 60, _lines(output) + count
    while process.poll() is None and time.monotonic() < deadline and _lines(output) < wanted:
        time.sleep(0.001)


def _wait_for_a_save(process, output) -> bool:
    """Return once a temporary checkpoint folder is seen (True), or the process ends or takes too long (False)."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        folder = output / "checkpoints"
        if folder.is_dir() and any(name.startswith(".tmp") for name in os.listdir(folder)):
            return True
        time.sleep(0.0005)
    return False
