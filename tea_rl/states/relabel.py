"""New rewards for stored completions: reward functions read the stored texts, the backbone is not needed.

Mending a damaged store (`embed` or `write_rollouts` again) keeps them, since it brings back the same rows in the same order.
Should the rewards themselves be damaged, nothing puts older ones in force: the store is refused until it is relabelled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tea_rl.errors import TeaError
from tea_rl.recipe import RewardSpec
from tea_rl.rewards import load_rewards
from tea_rl.states.manifest import LOCK_NAME, Manifest
from tea_rl.states.reward_file import remove_old_rewards, term_array, write_rewards
from tea_rl.states.store import StateStore
from tea_rl.training.checkpoint import replace_directory
from tea_rl.training.files import disk_errors, drop_lock, take_lock

#: Rewards, their terms, and the names and weights of the functions they are from.
_Labels: TypeAlias = tuple[np.ndarray, dict[str, np.ndarray], list[str]]


def relabel(
    store_path: str | Path,
    rewards: Sequence[RewardSpec],
    base_dir: str | Path = ".",
    output: str | Path | None = None,
) -> StateStore:
    """Score the completions of a store anew.

    Args:
        store_path: a complete store.
        rewards: reward functions, weights and settings.
        base_dir: folder of relative reward files.
        output: folder for a store with the new rewards, which shares its shards with the old one where the file system
            can link (they never change); None puts the new rewards in force in the old store, in one atomic step.

    Returns:
        the store with the new rewards.

    Raises:
        TeaError: for damaged texts, a reward that cannot be loaded or fails, or a full disk; nothing has changed then.
    """
    # Texts are read and checked; the states are when somebody trains on them. Rewards that are damaged are replaced.
    store = StateStore.open(store_path, verify=False, rewards=False)
    labels = (*rescore(store, rewards, base_dir), [f"{spec.name}={spec.weight:g}" for spec in rewards])
    if output is None:
        _replace_rewards(store, labels)
        return StateStore.open(store.path, verify=False)
    _write_copy(store, Path(output), labels)
    return StateStore.open(output, verify=False)


def rescore(
    store: StateStore, rewards: Sequence[RewardSpec], base_dir: str | Path = "."
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """New rewards of a store's completions and their terms, ``(rows,)`` each; nothing is written.

    Raises:
        TeaError: for a reward that cannot be loaded or fails.
    """
    function = load_rewards(rewards, base_dir)
    prompts, completions, columns = [], [], []
    for row in store.texts():
        prompts.append(row["prompt"])
        completions.append(row["completion"])
        columns.append(row["columns"])
    names = sorted({name for row in columns for name in row})
    batch = function(prompts, completions, {name: [row.get(name) for row in columns] for name in names})
    return term_array(list(batch.total)), {name: term_array(values) for name, values in batch.terms.items()}


def _replace_rewards(store: StateStore, labels: _Labels) -> None:
    path = store.path
    with disk_errors(f"write the rewards of {path}", "relabel again"):
        lock = take_lock(path / LOCK_NAME)
        try:
            manifest = Manifest.read(path)
            if not manifest.complete or manifest.shards != store.manifest.shards:
                raise TeaError(f"the store {path} was written to in the meantime; relabel it again")
            write_rewards(path, manifest, *labels)
            manifest.write(path)
            remove_old_rewards(path, manifest)
        finally:
            drop_lock(path / LOCK_NAME, lock)


def _write_copy(store: StateStore, output: Path, labels: _Labels) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TeaError(
            f"expected a new or empty folder for the relabelled store, but {output} is in use; choose another with --output"
        )
    manifest = Manifest.read(store.path)
    shared = [file for file in manifest.files if file != manifest.rewards]
    shared += [file for shard in manifest.shards for file in shard["files"]]

    def write(folder: Path) -> None:
        with disk_errors(f"write the store {output}", "relabel again"):
            for file in shared:
                try:
                    os.link(store.path / file, folder / file)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(store.path / file, folder / file)
            write_rewards(folder, manifest, *labels)
            manifest.write(folder)

    replace_directory(output, write)
