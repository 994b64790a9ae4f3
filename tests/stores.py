"""Small stores on a tiny model, shared by the tests of the state store."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tea_rl.states.embed import embed as embed_with

# Small batches and shards, so that a few rows make several of each.
embed = partial(embed_with, batch_tokens=100, shard_tokens=100)
ROWS = [
    {
        "prompt": f"question {i % 9}:",
        "completion": " yes" * (1 + i % 5),
        "reward": (i % 5) / 4 - 0.5,
        "extra": i,
    }
    for i in range(40)
]


class Stop(Exception):
    """What a test stops a writer with."""


def write_recipe(folder: Path, model: Path | str, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
    """A recipe over labelled rows in ``folder``, and its path."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"shortlist_size": 100},
        "data": {"dataset": str(data)},
        "objective": {"name": "reward_weighted"},
        "train": {"num_threads": 1},
    }
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a store, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "store.lock"}
