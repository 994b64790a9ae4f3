"""Which tokens each offline step reads, a function of (seed, step) alone, so that a resumed run reads the same ones."""

from __future__ import annotations

import numpy as np

#: Streams of random numbers, apart from those of `tea_rl.training.seeding`.
_ROWS, _TOKENS, _UNITS, _RETURNS = 11, 12, 13, 14
#: Tokens are shuffled within windows of about this many, whose rows are shuffled over the whole data: memory does not
#: grow with the data, and no minibatch sees neighbours.
WINDOW_TOKENS = 65536


class TokenPlan:
    """Minibatches of tokens from anywhere: every token once an epoch, in ``steps_per_epoch`` nearly equal parts.

    Args:
        offsets: first token of each row of the store and, last, their number, ``(rows + 1,)``.
        rows: rows to train on.
        minibatch_tokens: tokens of a step, about.
        seed: of the order.
    """

    def __init__(self, offsets: np.ndarray, rows: np.ndarray, minibatch_tokens: int, seed: int) -> None:
        self.rows, self.seed = np.asarray(rows, np.int64), seed
        self._starts = offsets[self.rows]
        self._lengths = offsets[self.rows + 1] - self._starts
        self.num_tokens = int(self._lengths.sum())
        self.steps_per_epoch = max(1, round(self.num_tokens / minibatch_tokens))
        self._window_steps = max(1, WINDOW_TOKENS // minibatch_tokens)
        self._window: tuple[int, int] | None = None
        self._tokens = np.empty(0, np.int64)

    def __call__(self, step: int) -> np.ndarray:
        """Global token indices of a step (from 1), ascending, int64."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        window = place // self._window_steps
        if self._window != (epoch, window):
            self._window, self._tokens = (epoch, window), self._shuffled_window(epoch, window)
        first = self._bound(window * self._window_steps)
        return np.sort(self._tokens[self._bound(place) - first : self._bound(place + 1) - first])

    def _bound(self, place: int) -> int:
        return min(place, self.steps_per_epoch) * self.num_tokens // self.steps_per_epoch

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        order = np.random.default_rng([self.seed, _ROWS, epoch]).permutation(len(self.rows))
        ends = np.cumsum(self._lengths[order])
        first = self._bound(window * self._window_steps)
        last = self._bound((window + 1) * self._window_steps)
        begin, end = np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1
        picked = order[begin:end]
        lengths = self._lengths[picked]
        stops = np.cumsum(lengths)
        tokens = np.repeat(self._starts[picked] - stops + lengths, lengths) + np.arange(int(lengths.sum()))
        before = int(ends[begin] - self._lengths[order[begin]])
        tokens = tokens[first - before : last - before]
        np.random.default_rng([self.seed, _TOKENS, epoch, window]).shuffle(tokens)
        return tokens


class RowPlan:
    """Minibatches of whole rows, or of whole pairs of rows: every unit once an epoch.

    Args:
        offsets: as for `TokenPlan`.
        units: rows that stay together, ``(U, rows of a unit)``.
        minibatch_tokens: tokens of a step, about.
        seed: of the order.
    """

    def __init__(self, offsets: np.ndarray, units: np.ndarray, minibatch_tokens: int, seed: int) -> None:
        self.units, self.seed = units, seed
        rows = units.flatten()
        self.num_tokens = int((offsets[rows + 1] - offsets[rows]).sum())
        self.steps_per_epoch = min(len(units), max(1, round(self.num_tokens / minibatch_tokens)))
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __call__(self, step: int) -> np.ndarray:
        """Rows of a step (from 1), unit by unit, int64."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, _UNITS, epoch]).permutation(len(self.units))
        first, last = (part * len(self.units) // self.steps_per_epoch for part in (place, place + 1))
        return self.units[self._order[first:last]].flatten()


class ReturnPlan:
    """Which return each token of a step is shown: that of its row, hidden in a share of the rows, drawn anew at each step.

    Args:
        known: return of each row of the store, NaN where it is unknown, ``(rows,)``.
        hidden: share of rows whose return is hidden.
        seed: of the draws.
    """

    def __init__(self, known: np.ndarray, hidden: float, seed: int) -> None:
        self.known, self.hidden, self.seed = known.astype(np.float32), hidden, seed

    def __call__(self, step: int, rows: np.ndarray, at: np.ndarray, num_anchor: int) -> np.ndarray:
        """Returns of the tokens of a step (from 1), then those of ``num_anchor`` tokens of ordinary text, float32.

        Ordinary text has no return. It is shown those of the step's rows, so that the head stays close to the original model on
        it whatever is asked.

        Shape:
            rows ``(R,)``; ``at``, each token's place in them, ``(N,)``; returns ``(N + num_anchor,)``.
        """
        random = np.random.default_rng([self.seed, _RETURNS, step])
        shown = np.where(random.random(len(rows)) < self.hidden, np.float32(np.nan), self.known[rows])
        return np.concatenate([shown[at], random.choice(shown, num_anchor)])
