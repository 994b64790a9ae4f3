"""The tokens of coming steps, read from a state store together.

A step's tokens lie scattered over the store, and to reach one costs more than to copy it. Those of some twenty steps are read in
the order in which they lie, so that neighbours share the way; memory does not grow with the store.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.store import StateStore

#: What is held in memory of the store.
READ_AHEAD_BYTES = 32 << 20


class ReadAhead:
    """Tokens of one step after the other.

    Args:
        store: where they lie.
        index_of_step: global token indices of a step (from 1), a function of the step alone.
        last_step: beyond which no step is read ahead of being asked for.
    """

    def __init__(self, store: StateStore, index_of_step: Callable[[int], np.ndarray], last_step: int) -> None:
        self._store, self._index_of_step, self._last_step = store, index_of_step, last_step
        self._indices: dict[int, np.ndarray] = {}
        self._held = np.empty(0, np.int64)
        self._tokens: TokenBatch | None = None

    def __call__(self, step: int) -> TokenBatch:
        """All tokens of a step, as ``store.tokens(index=...)`` gives them."""
        if step not in self._indices:
            self._read(step)
        assert self._tokens is not None
        return self._tokens.select(torch.from_numpy(np.searchsorted(self._held, self._indices[step])))

    def _read(self, step: int) -> None:
        """Read what a step and as many of the next ones need as there is room for."""
        self._indices, self._tokens = {}, None  # their memory serves the next ones
        indices = {step: self._index_of_step(step)}
        room = READ_AHEAD_BYTES // self._store.token_bytes - len(indices[step])
        while step < self._last_step and room > 0:
            step += 1
            indices[step] = self._index_of_step(step)
            room -= len(indices[step])
        self._held = np.unique(np.concatenate(list(indices.values())))
        self._tokens = self._store.tokens(index=self._held)
        self._indices = indices
