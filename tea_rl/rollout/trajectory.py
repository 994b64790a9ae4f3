"""What a rollout leaves behind: one record a generated token, and the completions they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tea_rl.head.policy import Shortlist


@dataclass
class TokenBatch:
    """``N`` generated tokens with all that a later update reads; the first axis of every tensor is ``N``.

    Attributes:
        states: hidden states that chose the tokens, ``(N, D)``, in the backbone's dtype; with context features wide
            ones, ``(N, D * (1 + num_means))``: the hidden state first, then the running means.
        shortlist: reference shortlist at the rollout temperature; None in full-vocabulary mode.
        actions: token ids as sampled.
        slots: shortlist slot of each action, ``k`` for the tail; the token id itself in full-vocabulary mode.
        within_tail_logps: ``l_a - tau`` for tail actions, 0 elsewhere.
        logps: log-probability under the behaviour policy, the one sampled from (nats).
        base_logps: the same under the original model.
        kl: exact KL(behaviour || original model) at the position.
        entropy: entropy of the behaviour policy at the position.
        state_ids: equal where tokens were chosen in the same state (generations that had not parted yet).
        rows: index of the completion the token belongs to.
        positions: index of the token in its completion.
    """

    states: Tensor
    shortlist: Shortlist | None
    actions: Tensor
    slots: Tensor
    within_tail_logps: Tensor
    logps: Tensor
    base_logps: Tensor
    kl: Tensor
    entropy: Tensor
    state_ids: Tensor
    rows: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.actions.shape[0]

    def select(self, index: Tensor) -> TokenBatch:
        """The tokens at ``index``, in that order."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Shortlist):
                value = Shortlist(*(part[index] for part in value))
            elif value is not None:
                value = value[index]
            values[field.name] = value
        return TokenBatch(**values)

    @staticmethod
    def cat(batches: Sequence[TokenBatch]) -> TokenBatch:
        """Join batches of one mode."""
        values: dict[str, Any] = {}
        for field in fields(TokenBatch):
            parts = [getattr(batch, field.name) for batch in batches]
            if isinstance(parts[0], Shortlist):
                values[field.name] = Shortlist(*(torch.cat(column) for column in zip(*parts, strict=True)))
            else:
                values[field.name] = None if parts[0] is None else torch.cat(parts)
        return TokenBatch(**values)

    @staticmethod
    def join(batches: Sequence[TokenBatch]) -> TokenBatch:
        """`cat` of batches that know nothing of each other: their rows and states are numbered on."""
        if len(batches) == 1:
            return batches[0]
        numbered: list[TokenBatch] = []
        rows = states = 0
        for batch in batches:
            numbered.append(replace(batch, rows=batch.rows + rows, state_ids=batch.state_ids + states))
            if len(batch):
                rows, states = (
                    int(numbers.max()) + 1 for numbers in (numbered[-1].rows, numbered[-1].state_ids)
                )
        return TokenBatch.cat(numbered)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a safetensors file; `from_tensors` puts it together again."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Shortlist):
                found |= {f"shortlist.{name}": part for name, part in value._asdict().items()}
            elif value is not None:
                found[field.name] = value
        # Some may be one tensor under two names, such as slots and actions without a shortlist; files hold no such thing.
        return {name: value.clone(memory_format=torch.contiguous_format) for name, value in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TokenBatch:
        """What `tensors` gave; other names are passed over."""
        listed = [tensors.get(f"shortlist.{name}") for name in Shortlist._fields]
        shortlist = None if listed[0] is None else Shortlist(*listed)  # type: ignore[arg-type]
        names = [field.name for field in fields(cls) if field.name != "shortlist"]
        return cls(shortlist=shortlist, **{name: tensors[name] for name in names})


@dataclass
class Rollout:
    """``B`` completions (``num_generations`` for each prompt, those of a prompt side by side).

    Attributes:
        tokens: every generated token, ordered by completion, then position.
        texts: decoded completions, without special tokens.
        lengths: generated tokens of each completion, ``(B,)``, an end-of-sequence token included.
        finished: whether the completion ended by itself (else: ``max_completion_length``), ``(B,)``.
        prompt_index: which prompt each completion answers, ``(B,)``.
    """

    tokens: TokenBatch
    texts: list[str]
    lengths: Tensor
    finished: Tensor
    prompt_index: Tensor

    def token_ids(self, row: int) -> Tensor:
        """Token ids of a completion as sampled, ``(length,)``."""
        return self.tokens.actions[self.tokens.rows == row]

    def mean_over_rows(self, per_token: Tensor) -> Tensor:
        """Mean of a per-token quantity within each completion, ``(B,)``."""
        sums = torch.zeros(len(self.texts), dtype=torch.float32, device=per_token.device)
        return sums.index_add_(0, self.tokens.rows, per_token.float()) / self.lengths
