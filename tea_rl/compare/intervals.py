"""Means over prompts and seeds, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 4000
_SEED = 0


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[Sequence[float]]) -> Interval:
    """Mean of one number for each prompt and seed, and its percentile bootstrap interval (Efron 1979).

    Prompts and seeds are drawn independently of each other, each with replacement: prompts that are hard are so for every
    seed, and a seed that failed did so on every prompt. With one seed the interval is about prompts alone.

    Args:
        values: one row a seed, one number a prompt; rows that end early shorten the others.

    Returns:
        NaN three times where there is nothing.

    >>> interval([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    Interval(mean=2.0, low=1.0, high=3.0)
    """
    width = min(map(len, values), default=0)
    if not width:
        return Interval(math.nan, math.nan, math.nan)
    table = np.asarray([row[:width] for row in values], np.float64)
    rng = np.random.default_rng(_SEED)
    seeds, prompts = table.shape
    # How often each row and column is drawn says all that a mean needs.
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), _RESAMPLES) / seeds
    columns = rng.multinomial(prompts, np.full(prompts, 1 / prompts), _RESAMPLES) / prompts
    means = ((rows @ table) * columns).sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(table.mean()), float(low), float(high))


def paired_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Interval:
    """Mean difference of two methods on the same prompts, seeds averaged, with its interval over prompts.

    >>> paired_difference([[1.0, 2.0, 6.0]], [[0.0, 1.0, 5.0]])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    width = min(map(len, [*first, *second]), default=0)
    if not width or not first or not second:
        return Interval(math.nan, math.nan, math.nan)
    means = [np.mean([row[:width] for row in rows], axis=0) for rows in (first, second)]
    return interval([(means[0] - means[1]).tolist()])
