"""Achieved against asked: does a head with return conditioning earn what it is told to?"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tea_rl.evaluation.evaluate import Evaluation
from tea_rl.head.layer import TeaHead
from tea_rl.training.files import atomic_write_bytes, disk_errors


def measure_returns(
    head: TeaHead,
    measure: Callable[[TeaHead], Evaluation],
    strengths: Sequence[float],
    returns: Sequence[float],
    notify: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Evaluate a head at every strength and every asked return.

    Args:
        measure: evaluates it as it stands.
        notify: hears what is under way.

    Returns:
        a row for each: ``strength``, ``return`` (None at strength 0, where the original model answers and nothing can be asked of
        it: one row), ``samples`` (sampled completions or episodes that count), ``standard_error`` (of ``eval_reward``, as if
        samples were independent) and the metrics.
    """
    pairs = [(alpha, value) for alpha in strengths for value in (returns if alpha else [None])]
    rows: list[dict[str, Any]] = []
    for alpha, value in pairs:
        notify(f"evaluating strength {alpha:g}" + ("" if value is None else f", return {value:g}"))
        head.strength = alpha
        head.set_return(value)
        found = measure(head)
        error = (
            float(np.std(found.rewards, ddof=1)) / math.sqrt(len(found.rewards))
            if len(found.rewards) > 1
            else math.nan
        )
        rows.append(
            {
                "strength": alpha,
                "return": value,
                "samples": len(found.rewards),
                "standard_error": error,
                **found.metrics,
            }
        )
    return rows


def write_returns_plot(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw the rows of `measure_returns` as a PNG: achieved over asked, a line for each strength, beside the diagonal.

    Bars are 95 % intervals; the dotted line is the original model, where it was measured.

    Raises:
        TeaError: if the disk refuses.
    """
    # The object interface: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    asked = sorted({row["return"] for row in rows if row["return"] is not None})
    axes.plot(asked, asked, color="#8b949e", linestyle="--", linewidth=1.2, label="achieved = asked")
    for alpha in sorted({row["strength"] for row in rows}):
        own = sorted(
            (row["return"], row["eval_reward"], 1.96 * row["standard_error"])
            for row in rows
            if row["strength"] == alpha and row["return"] is not None
        )
        if own:
            x, y, error = zip(*own, strict=True)
            label = "trained head" if alpha == 1.0 else f"strength {alpha:g}"
            axes.errorbar(x, y, yerr=error, marker="o", linewidth=2, capsize=3, label=label)
    for row in rows:
        if row["return"] is None:
            axes.axhline(
                row["eval_reward"], color="#8b949e", linestyle=":", linewidth=1.2, label="base model"
            )
    axes.set_xlabel("asked return")
    axes.set_ylabel("achieved, mean of the samples")
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with disk_errors(f"write {path}"):
        atomic_write_bytes(path, buffer.getvalue())
