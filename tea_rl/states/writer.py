"""Write a state store by append: whole shards or nothing, so that a killed writer continues where the last one ends."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
)
from tea_rl.states.reward_file import read_shard_rewards, write_rewards
from tea_rl.states.tensor_file import to_numpy, write_tensors
from tea_rl.training.files import atomic_write_bytes, disk_errors, fsync_dir, remove_stale_temporaries
from tea_rl.training.run_directory import _take_lock

#: A shard is closed once it holds this many tokens; a killed writer loses at most one shard.
SHARD_TOKENS = 32768
_CONTINUE = "run the same command again, it continues"


@dataclass
class StoredRow:
    """A completion as the store keeps it, beside the arrays of its tokens.

    Attributes:
        prompt_ids: token ids the model read first.
        prompt, completion: texts, as rewards see them.
        reward: None where the data has none.
        terms: unweighted reward terms.
        label: thumbs up or down; None where the data has none.
        pair: index of the preference pair; None for others.
        chosen: which of the pair it is.
        group: equal for rows with the same prompt.
        finished: ended by itself, not by a length limit.
        source_row: its position in the data it comes from.
        place: file and line, for errors.
        columns: the data's other columns; JSON values, or written as text.
    """

    prompt_ids: Sequence[int]
    prompt: str
    completion: str
    reward: float | None = None
    terms: dict[str, float | None] = field(default_factory=dict)
    label: bool | None = None
    pair: int | None = None
    chosen: bool | None = None
    group: int = 0
    finished: bool = True
    source_row: int = 0
    place: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


class StoreWriter:
    """Appends rows to the store in a folder, which it holds locked until `close`."""

    def __init__(self, path: Path, manifest: Manifest, lock: int, shard_tokens: int) -> None:
        self.path, self.manifest, self.shard_tokens = path, manifest, shard_tokens
        self._lock: int | None = lock
        self._clear()

    @classmethod
    def create_or_continue(
        cls,
        path: str | Path,
        header: StoreHeader,
        reference: torch.nn.Module,
        shard_tokens: int = SHARD_TOKENS,
    ) -> StoreWriter:
        """Begin a store, or go on after the last whole shard of one with the same header.

        Args:
            path: the folder, new, empty or with such a store.
            header: what the store is valid for, and the digest of its source.
            reference: output layer of the backbone; a copy of its weight (and bias) goes into the store.
            shard_tokens: when a shard is closed.

        Raises:
            TeaError: if the folder holds something else or is in use, the header differs, or the disk refuses.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise TeaError(
                f"expected a folder for the store, but {path} is a file; choose another with --output"
            )
        with disk_errors(f"write the store {path}", _CONTINUE):
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path / LOCK_NAME)
            try:
                remove_stale_temporaries(path)
                if (path / MANIFEST_NAME).is_file():
                    manifest = _continued(path, header)
                else:
                    manifest = _begun(path, header, reference)
            except BaseException:
                os.close(lock)
                raise
        return cls(path, manifest, lock, shard_tokens)

    @property
    def num_rows(self) -> int:
        """Rows in whole shards. Rows appended since the last one closed do not count yet."""
        return self.manifest.num_rows

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
            TeaError: if the disk refuses; whole shards survive.
        """
        if tokens.shortlist is None:
            raise ValueError("a store needs shortlists")
        lengths = torch.bincount(tokens.rows, minlength=len(rows))
        shortlist = tokens.shortlist
        arrays = {
            "states": tokens.states,
            "actions": tokens.actions.int(),
            "shortlist_ids": shortlist.ids.int(),
            "shortlist_logits": shortlist.logits.float(),
            "tail_logsumexp": shortlist.tail_logsumexp.float(),
            "tail_entropy": shortlist.tail_entropy.float(),
            "slots": tokens.slots.int(),
            "within_tail_logps": tokens.within_tail_logps.float(),
            "logps": tokens.logps.float(),
            "base_logps": tokens.base_logps.float(),
        }
        for name, tensor in arrays.items():
            self._pieces.setdefault(name, []).append(to_numpy(tensor))
        self._lengths += lengths.tolist()
        self._rows += rows
        self._tokens += len(tokens)
        if self._tokens >= self.shard_tokens:
            self._flush()

    def finish(self, notes: dict[str, Any] | None = None) -> None:
        """Close the last shard, write the rewards and mark the store complete.

        Raises:
            TeaError: if there are no rows, or the disk refuses.
        """
        self._flush()
        if not self.manifest.shards:
            raise TeaError(f"expected at least one row for the store {self.path}, got none; look at the data")
        with disk_errors(f"write the store {self.path}", _CONTINUE):
            write_rewards(self.path, self.manifest, *read_shard_rewards(self.path, self.manifest))
            self.manifest.complete = True
            self.manifest.notes = notes or {}
            self.manifest.write(self.path)

    def close(self) -> None:
        """Let other processes write. Can be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _clear(self) -> None:
        self._rows: list[StoredRow] = []
        self._lengths: list[int] = []
        self._pieces: dict[str, list[np.ndarray]] = {}
        self._tokens = 0

    def _flush(self) -> None:
        """Write what has gathered as a shard, then name it in the manifest."""
        if not self._rows:
            return
        name = f"shard-{len(self.manifest.shards):05d}"
        with disk_errors(f"write {name} of the store {self.path}", _CONTINUE):
            pieces = {**self._pieces, **_row_arrays(self._rows, self._lengths)}
            tensors = self.path / f"{name}.safetensors"
            # The name that `remove_stale_temporaries` looks for.
            temporary = tensors.with_name(f".{tensors.name}.tmp-{os.getpid()}")
            try:
                size, digest = write_tensors(temporary, pieces)
                os.replace(temporary, tensors)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            text = b"".join(_text_line(row) for row in self._rows)
            atomic_write_bytes(self.path / f"{name}.jsonl", text)
            fsync_dir(self.path)
            files = {
                f"{name}.safetensors": {"bytes": size, "sha256": digest},
                f"{name}.jsonl": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
            }
            shard = {"name": name, "rows": len(self._rows), "tokens": self._tokens, "files": files}
            self.manifest.shards.append(shard)
            try:
                self.manifest.write(self.path)
            except BaseException:
                self.manifest.shards.pop()
                raise
        self._clear()


def _row_arrays(rows: Sequence[StoredRow], lengths: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """Arrays with one entry a row; -1 and NaN stand for None."""
    prompts = np.concatenate([np.asarray(row.prompt_ids, np.int32) for row in rows])
    ends = np.cumsum([0, *(len(row.prompt_ids) for row in rows)], dtype=np.int64)
    arrays = {
        "prompt_ids": prompts,
        "prompt_offsets": ends,
        "token_offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "reward": np.array([np.nan if row.reward is None else row.reward for row in rows], np.float32),
        "label": np.array([-1 if row.label is None else row.label for row in rows], np.int8),
        "pair": np.array([-1 if row.pair is None else row.pair for row in rows], np.int64),
        "chosen": np.array([-1 if row.chosen is None else row.chosen for row in rows], np.int8),
        "group": np.array([row.group for row in rows], np.int64),
        "finished": np.array([row.finished for row in rows], np.bool_),
        "source_row": np.array([row.source_row for row in rows], np.int64),
    }
    return {name: [array] for name, array in arrays.items()}


def _text_line(row: StoredRow) -> bytes:
    value = {
        "prompt": row.prompt,
        "completion": row.completion,
        "place": row.place,
        "terms": row.terms,
        "columns": row.columns,
    }
    return (json.dumps(value, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")


def _begun(path: Path, header: StoreHeader, reference: torch.nn.Module) -> Manifest:
    """A new manifest and the reference weight, in a folder that holds nothing else."""
    others = sorted({item.name for item in path.iterdir()} - {LOCK_NAME, REFERENCE_NAME})
    if others:
        with suppress(OSError):
            (path / LOCK_NAME).unlink()
        raise TeaError(
            f"expected a new or empty folder for the store, but {path} holds {others[0]}; choose another with --output"
        )
    bias = getattr(reference, "bias", None)
    pieces = {"weight": [to_numpy(output_weight(reference))]}
    if isinstance(bias, torch.Tensor):
        pieces["bias"] = [to_numpy(bias)]
    temporary = path / f".{REFERENCE_NAME}.tmp-{os.getpid()}"
    size, digest = write_tensors(temporary, pieces)
    os.replace(temporary, path / REFERENCE_NAME)
    manifest = Manifest(header, files={REFERENCE_NAME: {"bytes": size, "sha256": digest}})
    manifest.write(path)
    return manifest


def _continued(path: Path, header: StoreHeader) -> Manifest:
    """The manifest of an earlier writer, cut back to its intact shards; other shard files are removed."""
    manifest = Manifest.read(path)
    before, now = vars(manifest.header).copy(), vars(header).copy()
    found = differing_keys(before.pop("keys"), now.pop("keys"))
    if before != now:
        others = differing_keys(before, now).replace("source is", "the digest of data and settings is")
        found = ", ".join(part for part in (found, others) if part)
    if found:
        raise TeaError(f"{path} holds a store made otherwise: {found}; choose another folder with --output")
    damaged = dict(manifest.damage(path))
    if REFERENCE_NAME in damaged:
        raise TeaError(
            f"the store {path} is damaged: {damaged[REFERENCE_NAME]}; remove the folder and start again"
        )
    names = [shard["name"] for shard in manifest.shards]
    first_bad = min((names.index(name) for name in damaged if name in names), default=len(names))
    if damaged:
        manifest.shards, manifest.complete, manifest.rewards = manifest.shards[:first_bad], False, None
        manifest.files = {REFERENCE_NAME: manifest.files[REFERENCE_NAME]}
        manifest.write(path)
    known = {file for shard in manifest.shards for file in shard["files"]} | set(manifest.files)
    for pattern in ("shard-*", "rewards-*"):
        for file in path.glob(pattern):
            if file.name not in known:
                file.unlink()
    return manifest
