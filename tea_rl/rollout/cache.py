"""A key-value cache whose room for the completion is taken once, not grown at every token.

``transformers``' dynamic cache concatenates: every decoded token copies the keys and values of the whole batch. Here
the layers of a prefilled cache move into buffers with room for the completion. Layers of other kinds (sliding window, recurrent) stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` that writes in place; ``keys`` and ``values`` are views of the filled part.

    Args:
        source: a prefilled layer.
        capacity: positions to make room for.
    """

    def __init__(self, source: DynamicLayer, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(source.keys, source.values)
        self._capacity = capacity
        self._fill(source.keys, source.values)

    def _fill(self, keys: Tensor, values: Tensor) -> None:
        rows, heads, length, _ = keys.shape
        self._keys = keys.new_empty(rows, heads, self._capacity, keys.shape[-1])
        self._values = values.new_empty(rows, heads, self._capacity, values.shape[-1])
        self._keys[:, :, :length] = keys
        self._values[:, :, :length] = values
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # noqa: ANN002, ANN003
        """Write new positions and return views of all filled ones."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._set_length(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``; one that occurs twice is copied."""
        length = self.get_seq_length()
        self._keys, self._values = self._keys.index_select(0, indices), self._values.index_select(0, indices)
        self._set_length(length)


def preallocate(cache: Cache, capacity: int) -> None:
    """Make room for ``capacity`` positions in a prefilled cache, in place."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer(layer, capacity)


def select_rows(cache: Cache, indices: Tensor) -> None:
    """Keep the rows at ``indices`` in every layer, in that order and with repeats, in place."""
    with torch.no_grad():
        for layer in cache.layers:
            layer.batch_select_indices(indices)
