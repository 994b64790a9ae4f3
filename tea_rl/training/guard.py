"""Reasons to end a run early: the policy is far from the original model, repeats itself, or writes what that finds odd."""

from __future__ import annotations

from collections.abc import Mapping

from tea_rl.recipe_groups import StopConfig


def reason_to_stop(stop: StopConfig, row: Mapping[str, float], base: Mapping[str, float]) -> str | None:
    """Which condition an evaluation meets, in words; None if it meets none.

    Args:
        stop: the conditions.
        row: ``eval_...`` figures of the policy; a condition on a figure that was not measured is not met.
        base: those of the original model.
    """
    nan = float("nan")
    kl = row.get("eval_kl", nan)
    if stop.kl is not None and kl > stop.kl:
        return f"KL {kl:.3f} is above train.stop_when.kl {stop.kl:g}"
    distinct, distinct_before = (figures.get("eval_distinct_2", nan) for figures in (row, base))
    if stop.distinct_2 is not None and distinct < stop.distinct_2 * distinct_before:
        return (
            f"distinct bigrams fell from {distinct_before:.2f} to {distinct:.2f}, below train.stop_when.distinct_2 "
            f"{stop.distinct_2:g} of them"
        )
    surprise, surprise_before = (figures.get("eval_base_nll", nan) for figures in (row, base))
    if stop.base_nll is not None and surprise > (1 + stop.base_nll) * surprise_before:
        return (
            f"surprise under the original model rose from {surprise_before:.2f} to {surprise:.2f}, by more than "
            f"train.stop_when.base_nll {stop.base_nll:g} of it"
        )
    return None
