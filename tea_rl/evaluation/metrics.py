"""Measures of a set of completions that no reward function can game."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all n-grams of all texts (Li et al. 2016); NaN if there is none.

    >>> distinct_n(["a b c", "a b d"])
    0.75
    """
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 if one side is constant.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 400.0, 500.0])
    1.0
    >>> spearman([1.0, 2.0, 2.0], [3.0, 3.0, 3.0])
    0.0
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    one, other = (values - values.mean() for values in ranks)
    scale = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[at]
