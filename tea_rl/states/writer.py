"""Write a state store by append: whole shards or nothing, so that a killed writer continues where the last one ends.

Shards end by a count of tokens, so that the same rows always give the same bytes. A slow writer also saves, by the clock,
what it has of the shard to come, in files that the shard replaces: how often that happened leaves no trace in the end.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from tea_rl.errors import TeaError
from tea_rl.probe import output_weight
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.keys import differing_keys
from tea_rl.states.manifest import (
    LOCK_NAME,
    MANIFEST_NAME,
    REFERENCE_NAME,
    Manifest,
    StoreHeader,
    file_damage,
)
from tea_rl.states.reward_file import read_shard_rewards, write_rewards
from tea_rl.states.rows import Piece, StoredRow, merge, rows_digest
from tea_rl.states.tensor_file import to_numpy, write_tensors
from tea_rl.training.files import (
    atomic_write_bytes,
    disk_errors,
    drop_lock,
    fsync_dir,
    remove_stale_temporaries,
    take_lock,
)
from tea_rl.training.run_directory import has_run

#: A shard is closed once it holds this many tokens.
SHARD_TOKENS = 32768
#: Seconds of work after which the rows of the shard to come are saved: about what a killed writer loses.
PART_SECONDS = 30.0
_CONTINUE = "run the same command again, it continues"


class StoreWriter:
    """Appends rows to the store in a folder, which it holds locked until `close`."""

    def __init__(self, path: Path, manifest: Manifest, lock: int, shard_tokens: int) -> None:
        self.path, self.manifest, self.shard_tokens = path, manifest, shard_tokens
        self._lock: int | None = lock
        self._pieces = [Piece.read(path, part["name"]) for part in manifest.parts]
        self._num_saved, self._saved_at = len(self._pieces), time.monotonic()
        self._busy = False

    @classmethod
    def create_or_continue(
        cls,
        path: str | Path,
        header: StoreHeader,
        reference: torch.nn.Module,
        shard_tokens: int = SHARD_TOKENS,
    ) -> StoreWriter:
        """Begin a store, or go on after the last intact row of one with the same header.

        A damaged store is cut back to where the damage begins. Rewards that `relabel` put in force stay: the same rows
        come back in the same order.

        Args:
            path: the folder, new, empty or with such a store.
            header: what the store is valid for, and the digest of its source.
            reference: output layer of the backbone; a copy of its weight (and bias) goes into the store.
            shard_tokens: when a shard is closed.

        Raises:
            TeaError: if the folder holds something else or is in use, the header differs, the disk refuses, or nothing
                but rewards of `relabel` is damaged.
        """
        path = Path(path)
        with disk_errors(f"write the store {path}", _CONTINUE):
            _refuse_foreign(path)
            is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path / LOCK_NAME)
            try:
                _refuse_foreign(path)  # again, now that nobody else writes
                remove_stale_temporaries(path)
                if (path / MANIFEST_NAME).is_file():
                    manifest = _continued(path, header, reference)
                else:
                    manifest = _begun(path, header, reference)
                return cls(path, manifest, lock, shard_tokens)
            except BaseException:
                drop_lock(path / LOCK_NAME, lock)
                if is_new:
                    with suppress(OSError):  # if anything is in there, it stays
                        path.rmdir()
                raise

    @property
    def num_rows(self) -> int:
        """Rows on disk. Rows appended since the last shard or part was written do not count yet."""
        return self.manifest.num_rows

    @property
    def final_rows(self) -> int | None:
        """Rows the store had when it was complete; None if it never was."""
        return self.manifest.final_rows

    @property
    def complete(self) -> bool:
        """Whether the store was finished, now or earlier."""
        return self.manifest.complete

    def append(self, rows: Sequence[StoredRow], tokens: TokenBatch) -> None:
        """Append rows that were computed together; they always end up in one shard.

        Args:
            rows: the rows.
            tokens: their tokens, ordered by row, then position; ``rows`` counts within this call.

        Raises:
            TeaError: if the disk refuses; what was written before survives.
        """
        self._busy = True
        self._pieces.append(Piece.of(rows, tokens))
        if sum(piece.num_tokens for piece in self._pieces) >= self.shard_tokens:
            self._close_shard()
        elif time.monotonic() - self._saved_at >= PART_SECONDS:
            self._save_part()
        self._busy = False

    def finish(self, notes: dict[str, Any] | None = None) -> None:
        """Close the last shard, write the rewards if there are none yet and mark the store complete.

        Raises:
            TeaError: if there are no rows, the disk refuses, or rewards of `relabel` are damaged.
        """
        self._busy = True
        self._close_shard()
        manifest = self.manifest
        if not manifest.shards:
            raise TeaError(f"expected at least one row for the store {self.path}, got none; look at the data")
        with disk_errors(f"write the store {self.path}", _CONTINUE):
            if manifest.rewards is None:
                write_rewards(self.path, manifest, *read_shard_rewards(self.path, manifest))
            manifest.complete, manifest.final_rows = True, manifest.num_rows
            manifest.notes = notes or {}
            manifest.write(self.path)
        _refuse_lost_rewards(self.path, manifest)

    def close(self) -> None:
        """Let other processes write. Can be called twice."""
        if self._lock is not None:
            drop_lock(self.path / LOCK_NAME, self._lock)
            self._lock = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Interrupted between two appends, nothing is lost; inside of one, what it has done is not known.
            if kind is not None and issubclass(kind, KeyboardInterrupt) and not self._busy:
                with suppress(TeaError):
                    self._save_part()
        finally:
            self.close()

    def _close_shard(self) -> None:
        """Write what has gathered as a shard, name it in the manifest and remove the parts it replaces."""
        if not self._pieces:
            return
        parts = self.manifest.parts
        self._enter(f"shard-{len(self.manifest.shards):05d}", self._pieces, self.manifest.shards, [])
        for file in (file for part in parts for file in part["files"]):
            with suppress(OSError):  # the next writer removes it
                (self.path / file).unlink()
        self._pieces, self._num_saved = [], 0

    def _save_part(self) -> None:
        """Write what has gathered since the last part."""
        if self._num_saved == len(self._pieces):
            return
        parts = list(self.manifest.parts)
        name = f"part-{len(self.manifest.shards):05d}-{len(parts):05d}"
        self._enter(name, self._pieces[self._num_saved :], parts, parts)
        self._num_saved = len(self._pieces)

    def _enter(
        self, name: str, pieces: Sequence[Piece], entries: list[dict[str, Any]], parts: list[dict[str, Any]]
    ) -> None:
        """Write pieces as ``name``, then the manifest with its entry among ``entries`` and the ``parts`` that are left."""
        with disk_errors(f"write {name} of the store {self.path}", _CONTINUE):
            arrays = merge(pieces)
            size, digest = _write_tensors(self.path / f"{name}.safetensors", arrays)
            text = b"".join(piece.text for piece in pieces)
            atomic_write_bytes(self.path / f"{name}.jsonl", text)
            fsync_dir(self.path)
            entry = {
                "name": name,
                "rows": sum(len(piece.lengths) for piece in pieces),
                "tokens": sum(piece.num_tokens for piece in pieces),
                "rows_sha256": rows_digest(arrays),
                "files": {
                    f"{name}.safetensors": {"bytes": size, "sha256": digest},
                    f"{name}.jsonl": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
                },
            }
            before = self.manifest.parts
            entries.append(entry)
            self.manifest.parts = parts
            try:
                self.manifest.write(self.path)
            except BaseException:
                entries.pop()
                self.manifest.parts = before
                raise
        self._saved_at = time.monotonic()


def _write_tensors(path: Path, pieces: dict[str, list[np.ndarray]]) -> tuple[int, str]:
    """`write_tensors` under a temporary name first, which is removed if the disk refuses."""
    # The name that `remove_stale_temporaries` looks for.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        written = write_tensors(temporary, pieces)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return written


def _refuse_foreign(path: Path) -> None:
    """Refuse, before anything is written, what can become no store."""
    advice = "choose another with --output"
    if path.exists() and not path.is_dir():
        raise TeaError(f"expected a folder for the store, but {path} is a file; {advice}")
    if has_run(path):
        raise TeaError(f"expected a new folder or a state store, but {path} is a run; {advice}")
    if not path.is_dir() or (path / MANIFEST_NAME).is_file():
        return
    others = sorted({item.name for item in path.iterdir()} - {LOCK_NAME, REFERENCE_NAME})
    others = [name for name in others if not (name.startswith(".") and ".tmp-" in name)]
    if any(name.startswith(("shard-", "part-")) for name in others):
        raise TeaError(
            f"{path} holds the shards of a store, but its {MANIFEST_NAME} is missing; put it back, or remove the store with "
            f"rm -r {path} and run the same command again"
        )
    if others:
        raise TeaError(
            f"expected a new or empty folder for the store, but {path} holds {others[0]}; {advice}"
        )


def _begun(path: Path, header: StoreHeader, reference: torch.nn.Module) -> Manifest:
    """A new manifest and the reference weight, in a folder that holds nothing else."""
    manifest = Manifest(header)
    _write_reference(path, manifest, reference)
    manifest.write(path)
    return manifest


def _write_reference(path: Path, manifest: Manifest, reference: torch.nn.Module) -> None:
    bias = getattr(reference, "bias", None)
    pieces = {"weight": [to_numpy(output_weight(reference))]}
    if isinstance(bias, torch.Tensor):
        pieces["bias"] = [to_numpy(bias)]
    size, digest = _write_tensors(path / REFERENCE_NAME, pieces)
    manifest.files[REFERENCE_NAME] = {"bytes": size, "sha256": digest}


def _continued(path: Path, header: StoreHeader, reference: torch.nn.Module) -> Manifest:
    """The manifest of an earlier writer, cut back to its intact rows; other shard files are removed."""
    manifest = Manifest.read(path)
    before, now = vars(manifest.header).copy(), vars(header).copy()
    found = differing_keys(before.pop("keys"), now.pop("keys"))
    if before != now:
        others = differing_keys(before, now).replace("source is", "the digest of data and settings is")
        found = ", ".join(part for part in (found, others) if part)
    if found:
        raise TeaError(f"{path} holds a store made otherwise: {found}; choose another folder with --output")
    damaged = dict(manifest.damage(path))
    if damaged:
        _cut_back(path, manifest, set(damaged))
        if REFERENCE_NAME in damaged:
            _write_reference(path, manifest, reference)
        manifest.write(path)
    known = {file for item in (*manifest.shards, *manifest.parts) for file in item["files"]}
    known |= set(manifest.files)
    for pattern in ("shard-*", "part-*", "rewards-*"):
        for file in path.glob(pattern):
            if file.name not in known:
                file.unlink()
    if manifest.complete:
        _refuse_lost_rewards(path, manifest)
    return manifest


def _cut_back(path: Path, manifest: Manifest, damaged: set[str]) -> None:
    """Take damaged shards, and what was written after them, out of a manifest."""
    intact = _intact(manifest.shards, damaged)
    if len(intact) < len(manifest.shards):
        manifest.shards, manifest.parts, manifest.complete = intact, [], False
    manifest.parts = _intact(manifest.parts, damaged)
    # The rows' own rewards come back from the shards; those of `relabel` are nowhere else.
    if manifest.rewards in damaged and manifest.relabelled is None:
        del manifest.files[manifest.rewards]
        manifest.rewards, manifest.complete = None, False


def _intact(items: list[dict[str, Any]], damaged: set[str]) -> list[dict[str, Any]]:
    first = next((number for number, item in enumerate(items) if item["name"] in damaged), len(items))
    return items[:first]


def _refuse_lost_rewards(path: Path, manifest: Manifest) -> None:
    """Refuse a complete store whose rewards are damaged and cannot be had from its shards."""
    assert manifest.rewards is not None  # a complete store has them
    wrong = file_damage(path / manifest.rewards, manifest.files[manifest.rewards])
    if wrong is not None:
        raise manifest.damage_error(path, manifest.rewards, wrong)
