"""Rows on their way into a store: what was computed together, and how a shard is put together from such pieces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.tensor_file import TensorFile, to_numpy

#: What `StateStore` reads of every shard when it is opened.
ROW_ARRAYS = ("token_offsets", "label", "pair", "chosen", "group", "finished", "source_row")
_OFFSETS = ("prompt_offsets", "token_offsets")


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


@dataclass
class Piece:
    """Rows that stay together.

    Attributes:
        arrays: one entry a token, a row or (``prompt_ids``) a token of a prompt; -1 and NaN stand for None.
        prompt_lengths, lengths: tokens of each row's prompt and completion, ``(rows,)`` int64.
        text: a JSON line a row.
    """

    arrays: dict[str, np.ndarray]
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    text: bytes

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rows."""
        return int(self.lengths.sum())

    @classmethod
    def of(cls, rows: Sequence[StoredRow], tokens: TokenBatch) -> Piece:
        """Rows and their tokens, ordered by row, then position; ``tokens.rows`` counts within ``rows``."""
        arrays = {**_token_arrays(tokens), **_row_arrays(rows)}
        prompt_lengths = np.array([len(row.prompt_ids) for row in rows], np.int64)
        lengths = torch.bincount(tokens.rows, minlength=len(rows)).cpu().numpy()
        return cls(arrays, prompt_lengths, lengths, b"".join(_text_line(row) for row in rows))

    @classmethod
    def read(cls, folder: Path, name: str) -> Piece:
        """Everything that was written as ``name``, in memory."""
        file = TensorFile(folder / f"{name}.safetensors")
        arrays = {key: np.array(file[key]) for key in file if key not in _OFFSETS}
        prompt_lengths, lengths = (np.diff(file[key]) for key in _OFFSETS)
        return cls(arrays, prompt_lengths, lengths, (folder / f"{name}.jsonl").read_bytes())


def merge(pieces: Sequence[Piece]) -> dict[str, list[np.ndarray]]:
    """The arrays of a file with all the pieces, each to be concatenated; the same bytes however the rows were parted."""
    arrays = {name: [piece.arrays[name] for piece in pieces] for name in sorted(pieces[0].arrays)}
    prompt_lengths = np.concatenate([piece.prompt_lengths for piece in pieces])
    lengths = np.concatenate([piece.lengths for piece in pieces])
    for name, counts in zip(_OFFSETS, (prompt_lengths, lengths), strict=True):
        arrays[name] = [np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])]
    return arrays


def rows_digest(arrays: Mapping[str, Sequence[np.ndarray]]) -> str:
    """SHA-256 (hex) over `ROW_ARRAYS`: opening a store checks those without reading its states."""
    sha = hashlib.sha256()
    for name in ROW_ARRAYS:
        for array in arrays[name]:
            sha.update(np.ascontiguousarray(array).view(np.uint8).data)
    return sha.hexdigest()


def _token_arrays(tokens: TokenBatch) -> dict[str, np.ndarray]:
    shortlist = tokens.shortlist
    if shortlist is None:
        raise ValueError("a store needs shortlists")
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
    return {name: to_numpy(tensor) for name, tensor in arrays.items()}


def _row_arrays(rows: Sequence[StoredRow]) -> dict[str, np.ndarray]:
    return {
        "prompt_ids": np.concatenate([np.asarray(row.prompt_ids, np.int32) for row in rows]),
        "reward": np.array([np.nan if row.reward is None else row.reward for row in rows], np.float32),
        "label": np.array([-1 if row.label is None else row.label for row in rows], np.int8),
        "pair": np.array([-1 if row.pair is None else row.pair for row in rows], np.int64),
        "chosen": np.array([-1 if row.chosen is None else row.chosen for row in rows], np.int8),
        "group": np.array([row.group for row in rows], np.int64),
        "finished": np.array([row.finished for row in rows], np.bool_),
        "source_row": np.array([row.source_row for row in rows], np.int64),
    }


def _text_line(row: StoredRow) -> bytes:
    value = {
        "prompt": row.prompt,
        "completion": row.completion,
        "place": row.place,
        "terms": row.terms,
        "columns": row.columns,
    }
    return (json.dumps(value, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")
