"""A key-value cache whose room for the completion is taken once, not grown at every token, and rows cut out of one.

``transformers``' dynamic cache concatenates: every decoded token copies the keys and values of the whole batch. Here
the layers of a prefilled cache move into buffers with room for the completion. Layers of other kinds (sliding window, recurrent) stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tea_rl.head.config import ContextConfig
from tea_rl.head.context import ContextState


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` that writes in place; ``keys`` and ``values`` are views of the filled part.

    Args:
        keys: buffer with room, ``(rows, heads, capacity, head_dim)``; taken over, not copied.
        values: the same for the values.
        length: slots that are filled.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._keys, self._values = keys, values
        self._set_length(length)

    @classmethod
    def of(cls, source: DynamicLayer, capacity: int) -> PreallocatedLayer:
        """A prefilled layer, moved into buffers for ``capacity`` positions."""
        buffers = []
        for filled in (source.keys, source.values):
            rows, heads, length, width = filled.shape
            buffer = filled.new_empty(rows, heads, capacity, width)
            buffer[:, :, :length] = filled
            buffers.append(buffer)
        return cls(buffers[0], buffers[1], source.get_seq_length())

    def _set_length(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self._keys.narrow(2, 0, length), self._values.narrow(2, 0, length)

    def get_seq_length(self) -> int:
        """Slots that are filled."""
        return self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # noqa: ANN002, ANN003
        """Write new positions and return views of all filled ones."""
        start, count = self._length, key_states.shape[2]
        self._keys.narrow(2, start, count).copy_(key_states)
        self._values.narrow(2, start, count).copy_(value_states)
        self._set_length(start + count)
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        """Keep the first so many slots; a negative number is how many go."""
        self._set_length(min(self._length, max_length if max_length >= 0 else self._length + max_length))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``; one that occurs twice is copied."""
        self._keys, self._values = self._keys.index_select(0, indices), self._values.index_select(0, indices)
        self._set_length(self._length)


def preallocate(cache: Cache, capacity: int) -> None:
    """Make room for ``capacity`` positions in a prefilled cache, in place."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer.of(layer, capacity)


def select_rows(cache: Cache, indices: Tensor) -> None:
    """Keep the rows at ``indices`` in every layer, in that order and with repeats, in place."""
    with torch.no_grad():
        for layer in cache.layers:
            layer.batch_select_indices(indices)


@dataclass(frozen=True)
class CachedRow:
    """What a cache holds of one sequence, without padding.

    Attributes:
        layers: keys and values of each layer, ``(heads, length, head_dim)``.
        length: tokens.
        context: running means after them, of one row; None without context features.
    """

    layers: list[tuple[Tensor, Tensor]]
    length: int
    context: ContextState | None


def cut_row(cache: Cache, row: int, slots: Tensor, context: ContextState | None) -> CachedRow:
    """Copy a row's ``slots`` out of a cache of full attention layers, and its running means."""
    layers = [
        (layer.keys[row].index_select(1, slots), layer.values[row].index_select(1, slots))
        for layer in cache.layers
    ]
    return CachedRow(layers, len(slots), None if context is None else _stack_contexts([(context, row)]))


def pack_rows(
    rows: Sequence[CachedRow], kept: Sequence[int], capacity: int, context: ContextConfig
) -> tuple[DynamicCache, ContextState | None]:
    """A cache of cut rows: the first ``kept`` tokens of each, right-aligned, in buffers for ``capacity`` positions.

    With running means ``kept`` must be the whole row.
    """
    cache, length = DynamicCache(), max(kept)
    for index, (keys, values) in enumerate(rows[0].layers):
        buffers = []
        for part, like in enumerate((keys, values)):
            # Zeros: what stands at padding has weight 0, but 0 times NaN is NaN.
            buffer = like.new_zeros(len(rows), like.shape[0], capacity, like.shape[2])
            for number, (row, count) in enumerate(zip(rows, kept, strict=True)):
                buffer[number, :, length - count : length] = row.layers[index][part][:, :count]
            buffers.append(buffer)
        cache.layers.append(PreallocatedLayer(buffers[0], buffers[1], length))
    if not context.num_means:
        return cache, None
    return cache, _stack_contexts([(row.context, 0) for row in rows if row.context is not None], length)


def _stack_contexts(rows: Sequence[tuple[ContextState, int]], length: int = 0) -> ContextState:
    """The running means of single rows as one batch, beside a cache of ``length`` slots."""
    stacked = ContextState(rows[0][0].config)
    stacked.length = length
    read = [
        (state.means[row], state.tokens[row])
        for state, row in rows
        if state.means is not None and state.tokens is not None
    ]
    stacked.means, stacked.tokens = (torch.stack(column) for column in zip(*read, strict=True))
    return stacked
