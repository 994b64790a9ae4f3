"""The rewards of a store: one small file beside the shards, so that new rewards replace nothing else.

The file is named after its content. New rewards come under a new name, and the manifest changes over to them in one
atomic write: a crash leaves either the old rewards in force or the new ones.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from tea_rl.states.manifest import Manifest
from tea_rl.states.tensor_file import TensorFile
from tea_rl.training.files import atomic_write_bytes, iterate_jsonl

_TERM = "terms/"


def write_rewards(
    folder: Path,
    manifest: Manifest,
    rewards: np.ndarray,
    terms: dict[str, np.ndarray],
    relabelled: list[str] | None = None,
) -> None:
    """Write rewards and terms (``(rows,)`` float32 each, NaN for none) and enter them in ``manifest``.

    ``relabelled`` names the reward functions they are from; None says that they are those the rows were written with.

    The caller writes the manifest; call `remove_old_rewards` after that.

    Raises:
        OSError: the disk's own error; nothing has changed then.
    """
    data = save({"reward": rewards, **{_TERM + name: values for name, values in terms.items()}})
    digest = hashlib.sha256(data).hexdigest()
    name = f"rewards-{digest[:12]}.safetensors"
    atomic_write_bytes(folder / name, data)
    if manifest.rewards is not None:
        manifest.files.pop(manifest.rewards, None)
    manifest.files[name] = {"bytes": len(data), "sha256": digest}
    manifest.rewards, manifest.relabelled = name, relabelled


def remove_old_rewards(folder: Path, manifest: Manifest) -> None:
    """Remove rewards files that are no longer in force."""
    for path in folder.glob("rewards-*.safetensors"):
        if path.name != manifest.rewards:
            with suppress(OSError):
                path.unlink()


def read_rewards(folder: Path, manifest: Manifest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards in force, and their terms by name."""
    assert manifest.rewards is not None  # a complete store has them
    arrays = load((folder / manifest.rewards).read_bytes())
    terms = {name.removeprefix(_TERM): value for name, value in arrays.items() if name.startswith(_TERM)}
    return arrays["reward"], terms


def read_shard_rewards(folder: Path, manifest: Manifest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards and terms as the rows were written with them."""
    rewards = [
        np.array(TensorFile(folder / f"{shard['name']}.safetensors")["reward"]) for shard in manifest.shards
    ]
    rows: list[dict[str, float | None]] = []
    for shard in manifest.shards:
        rows += [row["terms"] for _, row in iterate_jsonl((folder / f"{shard['name']}.jsonl").read_bytes())]
    names = sorted({name for row in rows for name in row})
    return np.concatenate(rewards), {name: term_array([row.get(name) for row in rows]) for name in names}


def term_array(values: list[float | None]) -> np.ndarray:
    """Float32 with NaN for None."""
    return np.array([np.nan if value is None else value for value in values], np.float32)


def term_value(value: float) -> float | None:
    """The reverse of `term_array`, for one value."""
    return None if np.isnan(value) else float(value)
