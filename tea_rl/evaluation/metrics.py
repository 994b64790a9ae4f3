"""Measures of a set of completions that no reward function can game."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all n-grams of all texts (Li et al. 2016); NaN if there is none.

    >>> distinct_n(["a b c", "a b d"])
    0.75
    """
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_repetition(text: str) -> float:
    """Share of a text's words that occurred in it before; 0 for one without words.

    >>> self_repetition("great, Great great film")
    0.5
    """
    words = _WORD.findall(text.lower())
    return 1 - len(set(words)) / len(words) if words else 0.0


def compressed_share(texts: Sequence[str]) -> float:
    """Compressed size over size of all texts together: what repeats, within a text or across, costs nearly nothing; NaN of nothing.

    >>> compressed_share(["the same"] * 50) < 0.1 < compressed_share(["the same"])
    True
    """
    data = "\n".join(texts).encode()
    return len(zlib.compress(data, 9)) / len(data) if data else float("nan")


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
