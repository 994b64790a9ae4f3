"""Read a state store: rows and tokens through a memory map, with a resident set that does not grow with the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import Shortlist
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.manifest import MANIFEST_NAME, REFERENCE_NAME, Manifest, file_damage
from tea_rl.states.reward_file import read_rewards, term_value
from tea_rl.states.rows import ROW_ARRAYS, rows_digest
from tea_rl.states.tensor_file import ShardFiles, TensorFile, to_torch


class StateStore:
    """A complete state store, opened for reading. Make one with :meth:`open`.

    Rows are numbered as they lie on disk, tokens as they lie in their rows, from 0. Row arrays are in memory, token arrays
    are mapped.

    Attributes:
        path: its folder.
        manifest: its manifest.
        keys: what it is valid for, see `tea_rl.states.keys`.
        kind: ``dataset`` or ``rollout``.
        width: numbers in a state, ``D * (1 + num_means)``.
        hidden_size, vocab_size, shortlist_size: ``D``, ``V``, ``k``.
        temperature: at which shortlists and log-probabilities are defined.
        logit_scale: of the backbone.
        offsets: first token of each row and, last, the number of tokens, ``(rows + 1,)`` int64.
        lengths: tokens of each row, ``(rows,)`` int64.
        rewards: float32, NaN for none.
        terms: unweighted reward terms by name, like ``rewards``.
        labels: int8; 1 good, 0 bad, -1 none.
        pairs: index of the preference pair, int64, -1 for none.
        chosen: int8; 1 chosen, 0 rejected, -1 no pair.
        groups: equal for rows with the same prompt, int64.
        finished: whether the row ended by itself, bool.
        source_rows: position of each row in the data it comes from, int64.
    """

    def __init__(self, path: Path, manifest: Manifest, verified: bool, rewards: bool) -> None:
        self.path, self.manifest = path, manifest
        self._unchecked = {} if verified else manifest.entries()
        header = manifest.header
        self.keys, self.kind = header.keys, header.kind
        self.width, self.hidden_size, self.vocab_size = header.width, header.hidden_size, header.vocab_size
        self.shortlist_size, self.temperature = header.shortlist_size, header.temperature
        self.logit_scale = header.logit_scale
        self._files = ShardFiles(path, [f"{shard['name']}.safetensors" for shard in manifest.shards])
        self._shard_rows = np.cumsum([0, *(shard["rows"] for shard in manifest.shards)])
        self._shard_tokens = np.cumsum([0, *(shard["tokens"] for shard in manifest.shards)])
        rows = self._read_row_arrays()
        ends = [
            part[1:] + start
            for part, start in zip(rows["token_offsets"], self._shard_tokens[:-1], strict=True)
        ]
        self.offsets = np.concatenate([np.zeros(1, np.int64), *ends])
        self.lengths = np.diff(self.offsets)
        arrays = {name: np.concatenate(parts) for name, parts in rows.items() if name != "token_offsets"}
        self.labels, self.pairs, self.chosen = arrays["label"], arrays["pair"], arrays["chosen"]
        self.groups, self.finished, self.source_rows = (
            arrays["group"],
            arrays["finished"],
            arrays["source_row"],
        )
        self.rewards = np.full(len(self), np.nan, np.float32)
        self.terms: dict[str, np.ndarray] = {}
        if rewards:
            assert manifest.rewards is not None  # a complete store has them
            self._check(manifest.rewards)
            self.rewards, self.terms = read_rewards(path, manifest)
            if any(len(values) != len(self) for values in (self.rewards, *self.terms.values())):
                raise ValueError(f"{manifest.rewards} and {MANIFEST_NAME} do not belong together")
        self._lines: dict[int, np.ndarray] = {}
        self.release()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True, rewards: bool = True) -> StateStore:
        """Open a complete store.

        Args:
            path: its folder.
            verify: read every byte once and compare all digests now; off, now only sizes and what is read at once, and the
                digest of every other file when it is first read.
            rewards: off, rewards are not read (nor missed), and are all NaN.

        Raises:
            TeaError: if there is none, it is not complete, or a part of it is damaged (named); with ``verify`` off, other
                methods raise it as well.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            raise TeaError(
                f"the store {path} is not complete ({manifest.num_rows} rows so far); run the command that began it again, "
                "it continues"
            )
        try:
            for name, wrong in manifest.damage(path, digests=verify):
                if rewards or name != manifest.rewards:
                    raise manifest.damage_error(path, name, wrong)
            return cls(path, manifest, verify, rewards)
        except (TeaError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if Manifest.read(path) != manifest:  # relabelled between two reads: the old rewards are gone
                return cls.open(path, verify, rewards)
            if isinstance(error, TeaError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TeaError(
                f"the store {path} cannot be read ({reason}); remove it with rm -r {path} and make it again"
            ) from error

    def _read_row_arrays(self) -> dict[str, list[np.ndarray]]:
        """Row arrays of every shard, in memory, compared with their own digest."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in ROW_ARRAYS}
        for number, shard in enumerate(self.manifest.shards):
            name = self._files.names[number]
            try:
                file = self._files[number]
                some = {array: [np.array(file[array])] for array in ROW_ARRAYS}
            except (ValueError, KeyError, TypeError, AttributeError):
                self._check(name)  # says what is wrong, if it was damaged on disk
                raise
            (offsets,), (labels,) = some["token_offsets"], some["label"]
            counted = (len(labels), int(offsets[-1])) == (shard["rows"], shard["tokens"])
            fits = file["states"].shape == (shard["tokens"], self.width)
            fits = fits and file["shortlist_ids"].shape == (shard["tokens"], self.shortlist_size)
            if rows_digest(some) != shard["rows_sha256"] or not counted or not fits:
                self._check(name)
                raise ValueError(f"{name} and {MANIFEST_NAME} do not belong together")
            for array in ROW_ARRAYS:
                rows[array] += some[array]
        return rows

    def _check(self, file: str) -> None:
        """Compare a file's digest before it is first read.

        Raises:
            TeaError: if it is damaged.
        """
        if file in self._unchecked:
            wrong = file_damage(self.path / file, self._unchecked[file])
            if wrong is not None:
                name = file if file in self.manifest.files else Path(file).stem
                raise self.manifest.damage_error(self.path, name, wrong)
            del self._unchecked[file]

    def _shard(self, number: int) -> TensorFile:
        """A shard's arrays, after `_check`."""
        self._check(self._files.names[number])
        return self._files[number]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the states, the backbone's."""
        return to_torch(self._shard(0)["states"][:0].copy()).dtype

    @property
    def token_bytes(self) -> int:
        """What a token takes up in memory, but for a few numbers beside its state and its shortlist."""
        return self.width * self.dtype.itemsize + self.shortlist_size * (8 + 4)

    def token_index(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Global indices of all tokens of the rows, in their order, int64."""
        rows = np.asarray(rows, np.int64)
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        within = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
        return np.repeat(self.offsets[rows], lengths) + within

    def tokens(
        self, rows: Sequence[int] | np.ndarray | None = None, index: np.ndarray | None = None
    ) -> TokenBatch:
        """Tokens with all that an update reads, on the CPU.

        Give one of the two:

        Args:
            rows: all tokens of these rows, row by row; ``TokenBatch.rows`` then counts within ``rows``.
            index: the tokens at these global indices; ``TokenBatch.rows`` then holds the store's row numbers.

        Returns:
            a batch whose ``state_ids`` are global token indices, and whose ``kl`` and ``entropy`` (not stored) are 0.
        """
        if (rows is None) == (index is None):
            raise ValueError("give rows or index")
        if rows is not None:
            index = self.token_index(rows)
            lengths = self.lengths[np.asarray(rows, np.int64)]
            numbers = np.repeat(np.arange(len(lengths)), lengths)
        else:
            index = np.asarray(index, np.int64)
            numbers = np.searchsorted(self.offsets, index, side="right") - 1
        own_rows = np.searchsorted(self.offsets, index, side="right") - 1
        part = self._gather(index)
        zeros = torch.zeros(len(index))
        shortlist = Shortlist(
            part["shortlist_ids"].long(),
            part["shortlist_logits"],
            part["tail_logsumexp"],
            part["tail_entropy"],
        )
        return TokenBatch(
            states=part["states"],
            shortlist=shortlist,
            actions=part["actions"].long(),
            slots=part["slots"].long(),
            within_tail_logps=part["within_tail_logps"],
            logps=part["logps"],
            base_logps=part["base_logps"],
            kl=zeros,
            entropy=zeros.clone(),
            state_ids=torch.from_numpy(index),
            rows=torch.from_numpy(numbers),
            positions=torch.from_numpy(index - self.offsets[own_rows]),
        )

    def token_array(self, name: str, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """One array (such as ``base_logps`` or ``actions``) of all tokens of the rows, without the states."""
        return self._gather(self.token_index(rows), (name,))[name]

    def _gather(self, index: np.ndarray, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Token arrays at global indices, as they are stored."""
        names = names or [
            "states", "actions", "shortlist_ids", "shortlist_logits", "tail_logsumexp", "tail_entropy", "slots",
            "within_tail_logps", "logps", "base_logps",
        ]  # fmt: skip
        shard_of = np.searchsorted(self._shard_tokens, index, side="right") - 1
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.num_tokens:
            raise IndexError(f"token indices run from 0 to {self.num_tokens - 1}")
        out = {}
        for name in names:
            like = self._shard(0)[name]
            out[name] = np.empty((len(index), *like.shape[1:]), like.dtype)
        for shard in np.unique(shard_of).tolist():
            where = np.flatnonzero(shard_of == shard)
            self._shard(shard).gather(index[where] - self._shard_tokens[shard], where, out)
        return {name: to_torch(array) for name, array in out.items()}

    def reference(self) -> nn.Linear:
        """The backbone's output layer, frozen."""
        self._check(REFERENCE_NAME)
        file = TensorFile(self.path / REFERENCE_NAME)
        weight = to_torch(np.array(file["weight"]))
        layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.in_features, layer.out_features = self.hidden_size, self.vocab_size
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if "bias" in file:
            layer.bias = nn.Parameter(to_torch(np.array(file["bias"])), requires_grad=False)
        return layer

    def make_head(self, config: HeadConfig | None = None, seed: int = 0) -> TeaHead:
        """A fresh head for the backbone the store was made with, which is not loaded."""
        head = TeaHead(self.reference(), config, logit_scale=self.logit_scale, seed=seed)
        head.base_model_name_or_path = self.keys["base_model_name_or_path"]
        head.reference_digest = self.keys["reference_digest"]
        head.base_settings = dict(self.manifest.header.base_settings)
        return head

    def text(self, row: int) -> dict[str, Any]:
        """``prompt``, ``completion``, ``place``, ``columns`` and ``terms`` of a row."""
        shard, local = self._row_place(row)
        path = self._text_file(shard)
        with open(path, "rb") as file:
            if shard not in self._lines:
                self._lines[shard] = np.cumsum([0, *(len(line) for line in file)])
            file.seek(self._lines[shard][local])
            value = json.loads(file.readline())
        value["terms"] = {name: term_value(values[row]) for name, values in self.terms.items()}
        return value

    def texts(self) -> Iterator[dict[str, Any]]:
        """`text` of every row, in order, without ``terms``; reads a line at a time."""
        for shard in range(len(self.manifest.shards)):
            with open(self._text_file(shard), "rb") as file:
                for line in file:
                    value = json.loads(line)
                    value.pop("terms")
                    yield value

    def prompt_ids(self, row: int) -> list[int]:
        """Token ids that the model read before the completion."""
        shard, local = self._row_place(row)
        file = self._shard(shard)
        offsets = file["prompt_offsets"]
        ids = file["prompt_ids"][offsets[local] : offsets[local + 1]].tolist()
        file.release()
        return ids

    def release(self) -> None:
        """Let go of every page read so far (they stay in the system's cache)."""
        self._files.release()

    def _text_file(self, shard: int) -> Path:
        name = f"{self.manifest.shards[shard]['name']}.jsonl"
        self._check(name)
        return self.path / name

    def _row_place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise TeaError(
                f"the store {self.path} has rows 0 to {len(self) - 1}, got row {row}; choose one of them"
            )
        shard = int(np.searchsorted(self._shard_rows, row, side="right")) - 1
        return shard, row - int(self._shard_rows[shard])
