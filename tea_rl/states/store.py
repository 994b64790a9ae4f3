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
from tea_rl.states.manifest import REFERENCE_NAME, Manifest
from tea_rl.states.reward_file import read_rewards, term_value
from tea_rl.states.tensor_file import TensorFile, to_torch

_ROW_ARRAYS = ("label", "pair", "chosen", "group", "finished", "source_row")


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

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        header = manifest.header
        self.keys, self.kind = header.keys, header.kind
        self.width, self.hidden_size, self.vocab_size = header.width, header.hidden_size, header.vocab_size
        self.shortlist_size, self.temperature = header.shortlist_size, header.temperature
        self.logit_scale = header.logit_scale
        self._files = [TensorFile(path / f"{shard['name']}.safetensors") for shard in manifest.shards]
        self._shard_rows = np.cumsum([0, *(shard["rows"] for shard in manifest.shards)])
        self._shard_tokens = np.cumsum([0, *(shard["tokens"] for shard in manifest.shards)])
        starts = zip(self._files, self._shard_tokens[:-1], strict=True)
        ends = [file["token_offsets"][1:] + start for file, start in starts]
        self.offsets = np.concatenate([np.zeros(1, np.int64), *ends])
        self.lengths = np.diff(self.offsets)
        rows = {name: np.concatenate([file[name] for file in self._files]) for name in _ROW_ARRAYS}
        self.labels, self.pairs, self.chosen = rows["label"], rows["pair"], rows["chosen"]
        self.groups, self.finished, self.source_rows = rows["group"], rows["finished"], rows["source_row"]
        self.rewards, self.terms = read_rewards(path, manifest)
        self._lines: dict[int, np.ndarray] = {}
        self.release()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> StateStore:
        """Open a complete store.

        Args:
            path: its folder.
            verify: read every byte once and compare digests; off, only sizes are compared.

        Raises:
            TeaError: if there is none, it is not complete, or a part of it is damaged (named).
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            raise TeaError(
                f"the store {path} is not complete ({manifest.num_rows} rows so far); run the command that began it again, "
                "it continues"
            )
        damaged = next(manifest.damage(path, digests=verify), None)
        if damaged is not None:
            again = "run the tea-rl embed or tea-rl rollout that made it again, which mends it"
            raise TeaError(f"the store {path} is damaged in {damaged[0]}: {damaged[1]}; {again}")
        try:
            return cls(path, manifest)
        except (OSError, ValueError, KeyError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TeaError(f"the store {path} cannot be read ({reason}); make it again") from error

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the states, the backbone's."""
        return to_torch(self._files[0]["states"][:0].copy()).dtype

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
            like = self._files[0][name]
            out[name] = np.empty((len(index), *like.shape[1:]), like.dtype)
        for shard in np.unique(shard_of):
            where = np.flatnonzero(shard_of == shard)
            self._files[shard].gather(index[where] - self._shard_tokens[shard], where, out)
        return {name: to_torch(array) for name, array in out.items()}

    def reference(self) -> nn.Linear:
        """The backbone's output layer, frozen."""
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
        path = self.path / f"{self.manifest.shards[shard]['name']}.jsonl"
        with open(path, "rb") as file:
            if shard not in self._lines:
                self._lines[shard] = np.cumsum([0, *(len(line) for line in file)])
            file.seek(self._lines[shard][local])
            value = json.loads(file.readline())
        value["terms"] = {name: term_value(values[row]) for name, values in self.terms.items()}
        return value

    def texts(self) -> Iterator[dict[str, Any]]:
        """`text` of every row, in order, without ``terms``; reads a line at a time."""
        for shard in self.manifest.shards:
            with open(self.path / f"{shard['name']}.jsonl", "rb") as file:
                for line in file:
                    value = json.loads(line)
                    value.pop("terms")
                    yield value

    def prompt_ids(self, row: int) -> list[int]:
        """Token ids that the model read before the completion."""
        shard, local = self._row_place(row)
        offsets = self._files[shard]["prompt_offsets"]
        ids = self._files[shard]["prompt_ids"][offsets[local] : offsets[local + 1]].tolist()
        self._files[shard].release()
        return ids

    def release(self) -> None:
        """Let go of every page read so far (they stay in the system's cache)."""
        for file in self._files:
            file.release()

    def _row_place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise TeaError(f"the store {self.path} has rows 0 to {len(self) - 1}, got row {row}")
        shard = int(np.searchsorted(self._shard_rows, row, side="right")) - 1
        return shard, row - int(self._shard_rows[shard])
