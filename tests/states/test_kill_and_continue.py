"""Invariant 7 for stores: ``kill -9`` at random moments of an embedding, writes included, then again: the same bytes."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import yaml
from tiny import save_tiny

KILLS = 10
#: Small shards: there are many of them to be killed in.
PROGRAM = """
import sys
from tea_rl.recipe import load_recipe
from tea_rl.states.embed import embed
embed(load_recipe(sys.argv[1]), sys.argv[2], batch_tokens=600, shard_tokens=800)
"""


@pytest.fixture
def recipe(tmp_path):
    rng = random.Random(0)
    rows = [
        {"prompt": f"question {i}", "completion": " x" * rng.randint(1, 40), "reward": rng.random()}
        for i in range(3000)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"name_or_path": str(save_tiny("llama", tmp_path)), "dtype": "float32"},
        "head": {"shortlist_size": 64, "context": {"layers": [1, -1]}},
        "data": {"dataset": "rows.jsonl"},
        "objective": {"name": "reward_weighted"},
        "train": {"num_threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def start(recipe, output):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(recipe), str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "store.lock"}


def num_shards(output):
    """Whole shards so far."""
    try:
        return len(json.loads((output / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def wait(process, met):
    """Until ``met()``, the end of the process, or a minute has passed; whether it was met."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if met():
            return True
        time.sleep(0.0002)
    return False


def writing(output):
    """Whether a temporary file, a shard half written, is there right now."""
    return output.is_dir() and any(name.startswith(".") for name in os.listdir(output))


@pytest.mark.slow
def test_killed_at_random_moments(recipe, tmp_path):
    whole = tmp_path / "whole"
    process = start(recipe, whole)
    assert process.wait(600) == 0, process.stderr.read()
    assert num_shards(whole) > 3 * KILLS

    rng, output, in_a_write, progress = random.Random(1), tmp_path / "killed", 0, []
    for kill in range(KILLS):
        before = num_shards(output)
        process = start(recipe, output)
        # Past the imports, which are most of the time; then a moment in the work or, every other time, in a write.
        assert wait(process, lambda before=before: num_shards(output) > before), process.stderr.read()
        if kill % 2:
            in_a_write += wait(process, lambda: writing(output))
        else:
            time.sleep(rng.uniform(0.0, 0.15))
        assert process.poll() is None, "it came to its end before it could be killed: use more rows"
        process.kill()
        process.wait()
        progress.append(num_shards(output))
    assert progress == sorted(progress) and progress[-1] < num_shards(whole)
    assert in_a_write >= 1
    process = start(recipe, output)
    assert process.wait(600) == 0, process.stderr.read()
    assert contents(output) == contents(whole)
