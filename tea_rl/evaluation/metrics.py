"""Measures of a set of completions that no reward function can game."""

from __future__ import annotations

from collections.abc import Sequence


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
