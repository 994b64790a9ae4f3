"""Invariant 7 for stores: ``kill -9`` at random moments of an embedding, writes included, then again: the same bytes.

Twice: where whole shards are all that survives, and where every batch is saved as a part of the shard to come. The
uninterrupted embedding saves no parts: they must leave no trace.
"""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import yaml
from stores import contents
from tiny import save_tiny

from tea_rl.states.manifest import Manifest

NUM_ROWS = 3000
NEVER = 1e9
PROGRAM = """
import sys
from tea_rl.recipe import load_recipe
from tea_rl.states import writer
from tea_rl.states.embed import embed
writer.PART_SECONDS = float(sys.argv[4])
embed(load_recipe(sys.argv[1]), sys.argv[2], batch_tokens=600, shard_tokens=int(sys.argv[3]))
"""


@pytest.fixture
def recipe(tmp_path):
    rng = random.Random(0)
    rows = [
        {"prompt": f"question {i}", "completion": " x" * rng.randint(1, 40), "reward": rng.random()}
        for i in range(NUM_ROWS)
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


def start(recipe, output, shard_tokens, part_seconds):
    arguments = [str(value) for value in (recipe, output, shard_tokens, part_seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def num_rows(output):
    """Rows on disk so far."""
    return Manifest.read(output).num_rows if (output / "manifest.json").is_file() else 0


def wait(process, met, pause=0.0002):
    """Until ``met()``, the end of the process, or a minute has passed; whether it was met."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if met():
            return True
        time.sleep(pause)
    return False


def writing(output):
    """Whether a temporary file, a shard half written, is there right now."""
    return output.is_dir() and any(name.startswith(".") for name in os.listdir(output))


@pytest.mark.slow
@pytest.mark.parametrize(("shard_tokens", "part_seconds", "kills"), [(800, NEVER, 10), (6000, 0.0, 6)])
def test_killed_at_random_moments(recipe, tmp_path, shard_tokens, part_seconds, kills):
    whole = tmp_path / "whole"
    process = start(recipe, whole, shard_tokens, NEVER)
    assert process.wait(600) == 0, process.stderr.read()
    assert num_rows(whole) == NUM_ROWS

    rng, output, in_a_write, progress = random.Random(1), tmp_path / "killed", 0, []
    for kill in range(kills):
        before = num_rows(output)
        process = start(recipe, output, shard_tokens, part_seconds)
        # Past the imports, which are most of the time; then a moment in the work or, every other time, in a write.
        started = wait(process, lambda before=before: num_rows(output) > before, pause=0.01)
        assert started, process.stderr.read()
        if kill % 2:
            in_a_write += wait(process, lambda: writing(output))
        else:
            time.sleep(rng.uniform(0.0, 0.15))
        assert process.poll() is None, "it came to its end before it could be killed: use more rows"
        process.kill()
        process.wait()
        progress.append(num_rows(output))
    assert progress == sorted(set(progress)) and progress[-1] < NUM_ROWS
    assert in_a_write >= 1
    process = start(recipe, output, shard_tokens, part_seconds)
    assert process.wait(600) == 0, process.stderr.read()
    assert contents(output) == contents(whole)
