"""Growing token sequences over one key-value cache: prompts run once, then one token of all of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from tea_rl.backbone import Backbone
from tea_rl.head.config import ContextConfig
from tea_rl.head.context import ContextState
from tea_rl.rollout.cache import CachedRow, cut_row, pack_rows, preallocate, select_rows
from tea_rl.rollout.shared_prefix import Readers, share_prefix, worth_sharing
from tea_rl.rollout.tape import tape_of

#: A batch is compacted when at least this share of its rows has finished; compacting copies the cache.
_COMPACT_SHARE = 0.125
#: A larger batch that is rearranged gets a multiple of so many rows: oneDNN makes, and keeps, kernels for every number that it meets.
_ROWS = 8
#: A shared prefix shorter than this is not worth a forward pass of its own.
_MIN_SHARED_PREFIX = 16

#: A row at most this many times as long as another one, and a few tokens, runs in the same pass.
_LONGER = 2


class Prefilled(NamedTuple):
    """``U`` distinct sequences after a pass.

    Attributes:
        states: newest state of each, ``(U, D)``, wide with a context.
        mask: 0 on padding, ``(U, length)``.
        cache: keys and values of ``length`` slots.
        context: running means; None without context features.
        tokens_run: token positions of all rows that went through the backbone, padding included.
    """

    states: Tensor
    mask: Tensor
    cache: DynamicCache
    context: ContextState | None
    tokens_run: int


class Sequences:
    """The growing sequences: cache, running means, masks and newest states of the distinct ones, and who has which.

    Args:
        backbone: the frozen model.
        start: the distinct sequences so far.
        at: which of them each of the ``N`` completions has, ``(N,)``.
        room: tokens that `advance` may append.
        share: whether rows may share what the cache holds of long prompts; nothing can be `cut` then.

    Attributes:
        rows: completions that still grow, ``(N,)``.
        at: the distinct sequence each of them has so far, ``(N,)``.
        states: newest state of each distinct sequence, ``(U, D)``, wide with a context.
        tokens_run: token positions of all rows that went through the backbone, the start's included.
    """

    def __init__(
        self, backbone: Backbone, start: Prefilled, at: Tensor, room: int, share: bool = False
    ) -> None:
        self.backbone, self.at = backbone, at
        self.states, mask, self.cache, self.context, self.tokens_run = start
        self.length = mask.shape[1]
        self._readers: Readers | None = None
        if share and attends_to_all(backbone) and worth_sharing(backbone, mask, len(at)):
            self._readers = share_prefix(self.cache, mask, room)
        else:
            preallocate(self.cache, self.length + room)
        self.mask = torch.cat([mask, mask.new_ones(len(mask), room)], dim=1)
        self.positions = mask.sum(dim=1, keepdim=True)
        self.rows = torch.arange(len(at), device=mask.device)
        self._playing: Callable[[], AbstractContextManager[None]] | None = None

    def advance(self, actions: Tensor, ended: Tensor) -> None:
        """Append the completions' tokens, let go of those that ended, and run the backbone by one token."""
        if self._playing is None:  # not before there is a step: recording takes as long as a dozen
            tape = tape_of(self.backbone)
            self._playing = nullcontext if tape is None else tape.playing
        self.rows, actions = self.rows[~ended], actions[~ended]
        pairs = self.at[~ended] * self.backbone.vocab_size + actions
        distinct, which = torch.unique(pairs, return_inverse=True)
        parents, tokens = distinct // self.backbone.vocab_size, distinct % self.backbone.vocab_size
        if self._must_rearrange(parents):
            # What fills the batch up is nobody's, as are rows that have ended and not been let go.
            kept = torch.cat([parents, parents[:1].expand(_batch_size(len(parents)) - len(parents))])
            select_rows(self.cache, kept)
            if self._readers is not None:
                self._readers.select(kept)
            if self.context is not None:
                self.context.select_rows(kept)
            self.mask, self.positions, self.at = self.mask[kept], self.positions[kept], which
            places = torch.arange(len(parents), device=parents.device)
        else:
            self.at, places = parents[which], parents
        tokens = torch.full_like(self.positions[:, 0], self.backbone.pad_token_id).scatter_(0, places, tokens)
        self.length += 1
        with self._playing():
            states = self.backbone.forward(
                input_ids=tokens.unsqueeze(1),
                attention_mask=self.mask[:, : self.length],
                position_ids=self.positions,
                past_key_values=self.cache,
                context=self.context,
            )
        self.states = states[:, -1]
        self.positions = self.positions + 1
        self.tokens_run += len(self.positions)

    def cut(self, row: int) -> CachedRow:
        """A copy of what the cache holds of a distinct sequence, for `extend`; of one that has not been let go yet."""
        slots = self.mask[row, : self.length].nonzero().squeeze(1)
        return cut_row(self.cache, row, slots, self.context)

    def _must_rearrange(self, parents: Tensor) -> bool:
        """Whether sequences part, or enough of them have ended to be worth a copy of the cache."""
        held = len(self.positions)
        parted = len(parents.unique()) < len(parents)
        return parted or held - _batch_size(len(parents)) >= max(1, _COMPACT_SHARE * held)


def _batch_size(rows: int) -> int:
    """Rows that a batch of so many distinct sequences has."""
    return rows if rows <= _ROWS else -(-rows // _ROWS) * _ROWS


def attends_to_all(backbone: Backbone) -> bool:
    """Whether every layer attends to the whole sequence and positions are given: padding may then stand anywhere."""
    return backbone.takes_positions and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=backbone.model.config).layers
    )


def prefill(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    context: ContextState | None,
    cache: DynamicCache | None = None,
) -> Prefilled:
    """Run prompts from their beginning; a prefix that all of them share runs once.

    Args:
        context: a fresh state, or None without context features.
        cache: an empty one; None takes the kind that the model asks for.
    """
    device, count = backbone.device, len(prompts)
    cache = DynamicCache(config=backbone.model.config) if cache is None else cache
    # Padding will stand between the prefix and the rest.
    shared = shared_prefix(prompts) if attends_to_all(backbone) else 0
    if shared:
        cache, read = _prefix(backbone, tuple(prompts[0][:shared]), context)
        for layer in cache.layers:
            layer.batch_repeat_interleave(count)
        if context is not None and read is not None:
            read.repeat_interleave(count)
            vars(context).update(vars(read))
    rest = [prompt[shared:] for prompt in prompts]
    longest = max(map(len, rest))
    ids = torch.full((count, longest), backbone.pad_token_id)
    mask = torch.zeros(count, shared + longest, dtype=torch.long)
    mask[:, :shared] = 1
    for row, tokens in enumerate(rest):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, shared + longest - len(tokens) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]
    states = backbone.forward(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, context=context
    )
    return Prefilled(states[:, -1], mask, cache, context, shared + ids.numel())


def _prefix(
    backbone: Backbone, tokens: tuple[int, ...], context: ContextState | None
) -> tuple[DynamicCache, ContextState | None]:
    """Cache and running means of one row after a shared prefix. The newest is remembered: worked examples seldom change."""
    key = (tokens, None if context is None else context.config)
    if backbone.newest_prefix is None or backbone.newest_prefix[0] != key:
        cache, read = DynamicCache(config=backbone.model.config), copy(context)
        ids = torch.tensor([tokens], device=backbone.device)
        backbone.forward(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(len(tokens), device=backbone.device).unsqueeze(0),
            past_key_values=cache,
            context=read,
        )
        backbone.newest_prefix = (key, cache, read)
    _, cache, read = backbone.newest_prefix
    return deepcopy(cache), deepcopy(read)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the token prefix common to all prompts, leaving each at least one token; 0 where not worth it."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(list, prompts))
    first, last = ordered[0], ordered[-1]
    shortest = min(map(len, prompts)) - 1
    shared = 0
    while shared < shortest and first[shared] == last[shared]:
        shared += 1
    return shared if shared >= _MIN_SHARED_PREFIX else 0


# -- going on from cut rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of every row stand: kept ones right-aligned in ``before`` slots, then ``columns`` that are run.

    Attributes:
        kept: tokens of each row that stay in the cache.
        run: tokens of each row that go through the backbone, its last ones.
    """

    kept: list[int]
    run: list[int]

    @property
    def before(self) -> int:
        return max(self.kept)

    @property
    def columns(self) -> int:
        return max(self.run)

    def mask(self) -> Tensor:
        """0 on padding, ``(U, before + columns)``."""
        mask = torch.zeros(len(self.kept), self.before + self.columns, dtype=torch.long)
        for row, (kept, run) in enumerate(zip(self.kept, self.run, strict=True)):
            mask[row, self.before - kept : self.before] = 1
            mask[row, mask.shape[1] - run :] = 1
        return mask


def extend(
    backbone: Backbone,
    rows: Sequence[CachedRow],
    token_ids: Sequence[Sequence[int]],
    context: ContextConfig,
    room: int = 0,
) -> tuple[Tensor, Prefilled]:
    """Run what is new of several sequences in one pass.

    Rows have different numbers of new tokens. A shorter one is filled up with its own last tokens, which leave the cache
    and run again: that costs no more than padding, and no padding ever stands between two tokens, which sliding
    windows and models that count positions themselves would trip over. Running means must not read a token twice: with
    them there is padding in between, so they need a model that `attends_to_all`.

    Args:
        rows: what is known of each sequence; the rows stay as they are.
        token_ids: all tokens of each, the known ones first.
        context: of the head; decides whether running means are carried.
        room: slots to leave free after the pass.

    Returns:
        the states of the pass, ``(U, columns, D)``, those of the newest tokens last; and the sequences after it.
    """
    device = backbone.device
    fresh = [len(ids) - row.length for ids, row in zip(token_ids, rows, strict=True)]
    run = fresh if context.num_means else [min(max(fresh), len(ids)) for ids in token_ids]
    layout = _Layout([len(ids) - n for ids, n in zip(token_ids, run, strict=True)], run)
    mask = layout.mask()
    ids = torch.full((len(rows), layout.columns), backbone.pad_token_id)
    for row, (tokens, count) in enumerate(zip(token_ids, run, strict=True)):
        ids[row, layout.columns - count :] = torch.tensor(tokens[len(tokens) - count :], dtype=torch.long)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, layout.before :]
    cache, read = pack_rows(rows, layout.kept, layout.before + layout.columns + room, context)
    mask = mask.to(device)
    states = backbone.forward(
        input_ids=ids.to(device),
        attention_mask=mask,
        position_ids=positions.to(device),
        past_key_values=cache,
        context=read,
    )
    return states, Prefilled(states[:, -1], mask, cache, read, ids.numel())


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows with similar lengths, a group a pass: one long row must not make the short ones as long as itself.

    >>> like_lengths([20, 300, 25])
    [[0, 2], [1]]
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if groups and lengths[number] <= _LONGER * lengths[groups[-1][0]] + _MIN_SHARED_PREFIX:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def join(parts: Sequence[Prefilled], context: ContextConfig, room: int) -> Prefilled:
    """Put the sequences of several passes into one batch, padding on the left only."""
    if len(parts) == 1:
        return parts[0]
    rows = [
        cut_row(part.cache, row, part.mask[row].nonzero().squeeze(1), part.context)
        for part in parts
        for row in range(len(part.mask))
    ]
    lengths = [row.length for row in rows]
    cache, read = pack_rows(rows, lengths, max(lengths) + room, context)
    mask = _Layout(lengths, [0] * len(rows)).mask().to(parts[0].mask.device)
    states = torch.cat([part.states for part in parts])
    return Prefilled(states, mask, cache, read, sum(part.tokens_run for part in parts))
