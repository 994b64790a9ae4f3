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
        "rollout": {"prompts_per_step": 3, "num_generations": 4, "max_completion_length": 6},
        "train": {"max_steps": 30, "save_steps": 1, "eval_steps": 10, "num_threads": 1},
    }
    path = tmp_path / "kill.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_killed_at_random_moments(recipe, tmp_path):
    whole = tmp_path / "whole"
    started = time.monotonic()
    result = run(recipe, whole)
    duration = time.monotonic() - started
    assert result.returncode == 0, result.stderr

    rng = random.Random(0)
    killed, saving, output = 0, 0, tmp_path / "killed"
    while killed < KILLS:
        options = ["--resume"] if output.exists() else []
        process = subprocess.Popen(
            command(recipe, output, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if killed % 3 == 2:
            saving += _wait_for_a_save(process, output)  # every third one dies with a checkpoint half written
        else:
            # Most of a start is imports; the kills are to land in the run as well.
            deadline = time.monotonic() + rng.uniform(0.5, 1.0) * min(duration, 12.0)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        if process.poll() is not None:
            break  # the run came to its end between two kills
        process.kill()
        process.wait()
        killed += 1
    assert killed >= 10
    assert saving >= 1, "no kill hit a save: make the head larger"
    final = run(recipe, output, "--resume")
    assert final.returncode == 0, final.stderr
    assert digest(output) == digest(whole)
    steps = [
        line.split(",")[0]
        for line in (output / "metrics.jsonl").read_text().splitlines()
        if '"reward"' in line
    ]
    assert steps == [f'{{"step": {step}' for step in range(1, 31)]
    assert not [name for name in os.listdir(output / "checkpoints") if name.startswith(".tmp")]


def _wait_for_a_save(process, output) -> bool:
    """Return once a temporary checkpoint folder is seen (True), or the process ends or takes too long (False)."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        folder = output / "checkpoints"
        if folder.is_dir() and any(name.startswith(".tmp") for name in os.listdir(folder)):
            return True
        time.sleep(0.0005)
    return False
