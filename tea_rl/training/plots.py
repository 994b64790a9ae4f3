"""The learning curves of a run as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tea_rl.training.files import atomic_write_bytes, disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GREY, _GRID = "#24292f", "#8b949e", "#e6e8eb"
_BLUE, _ORANGE, _TRAIN = "#1f6feb", "#d9730d", "#a8c7f0"

#: Small panels: title, axis label, training key, evaluation key. A panel with no numbers is left out.
_PANELS = (
    ("KL to the base model", "nats a token", "kl", "eval_kl"),
    ("Entropy", "nats a token", "entropy", None),
    ("Surprise to the base model", "nats a token", None, "eval_base_nll"),
    ("Distinct bigrams", "share", None, "eval_distinct_2"),
    ("Accuracy of the likeliest token", "share", None, "eval_accuracy"),
    ("Reward and gain", "rank correlation", None, "eval_reward_correlation"),
    ("Pairs: chosen likelier", "share", None, "eval_pair_accuracy_logp"),
)


class _MainLines(NamedTuple):
    """The large panel: its title and unit, three keys and two labels."""

    title: str
    unit: str
    train: str
    extra: str
    held_out: str
    held_out_label: str
    base_label: str


_REWARD_LINES = _MainLines(
    "Reward",
    "mean reward",
    "reward",
    "eval_reward_greedy",
    "eval_reward",
    "held-out, sampled",
    "base model, sampled",
)
_LOSS_LINES = _MainLines(
    "Loss",
    "training: objective; held-out: nats a token",
    "loss",
    "",
    "eval_loss",
    "held-out cross-entropy",
    "base model",
)


#: What no skill earns in an environment, measured with the base model.
_WITHOUT_SKILL = (
    ("eval_random_reward", "random answers", ":"),
    ("eval_constant_reward", "best constant answer", "-."),
)


def write_curves(metrics_rows: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw ``curves.png``: reward (offline: loss) above, the other measures below; dashed lines are the base model.

    Args:
        metrics_rows: lines of ``metrics.jsonl``, training and evaluation mixed, in any order. Missing keys and numbers
            that are not finite leave gaps.
        path: the PNG, replaced atomically.
        title: shown above the picture, for instance the recipe's name.

    Raises:
        TeaError: if the disk refuses.
    """
    # The object interface: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [panel for panel in _PANELS if any(_series(metrics_rows, key)[0] for key in panel[2:] if key)]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(12, 7.2 if panels else 4.2), dpi=120, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    grid = figure.add_gridspec(
        2 if panels else 1, max(1, len(panels)), height_ratios=[1.55, 1] if panels else None
    )
    offline = _series(metrics_rows, "eval_loss")[0] or not _series(metrics_rows, "reward")[0]
    main = _LOSS_LINES if offline and _series(metrics_rows, "loss")[0] else _REWARD_LINES
    _draw_main(figure.add_subplot(grid[0, :]), metrics_rows, main)
    for column, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1, column]), metrics_rows, *panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with disk_errors(f"write {path}"):
        atomic_write_bytes(path, buffer.getvalue())


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of a key, by step; the later line wins where a step was logged twice."""
    found = {
        float(row["step"]): float(row[key])
        for row in rows
        if isinstance(row.get("step"), int | float)
        and isinstance(row.get(key), int | float)
        and math.isfinite(row[key])
    }
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def _base_level(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The base model's value: that of the evaluation before the first step."""
    steps, values = _series([row for row in rows if not row.get("imitated")], key)
    return values[0] if steps and steps[0] == 0 else None


def _draw_main(axes: Axes, rows: Sequence[dict[str, Any]], lines: _MainLines) -> None:
    _style(axes, lines.title, lines.unit)
    train, extra, held_out = (_series(rows, key) for key in (lines.train, lines.extra, lines.held_out))
    if train[0]:
        axes.plot(*train, color=_TRAIN, linewidth=1.4, marker=".", markersize=5, label="training batch")
    if extra[0]:
        axes.plot(*extra, color=_ORANGE, linewidth=1.8, marker="s", markersize=5, label="held-out, greedy")
    if held_out[0]:
        axes.plot(
            *held_out, color=_BLUE, linewidth=2.4, marker="o", markersize=6.5, label=lines.held_out_label
        )
    base = _base_level(rows, lines.held_out)
    if base is not None:
        axes.axhline(base, color=_GREY, linewidth=1.2, linestyle="--", zorder=1, label=lines.base_label)
    for key, label, style in _WITHOUT_SKILL:
        level = _base_level(rows, key)
        if level is not None:
            axes.axhline(level, color=_GREY, linewidth=1.2, linestyle=style, zorder=1, label=label)
    if train[0] or held_out[0]:
        axes.margins(y=0.12)
        # Below the axes: there it hides no point, however the curve runs.
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=4,
            frameon=False,
            fontsize=9.5,
            labelcolor=_INK,
        )
    else:
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _draw_panel(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    title: str,
    unit: str,
    train_key: str | None,
    eval_key: str | None,
) -> None:
    _style(axes, title, unit, size=10)
    if train_key:
        axes.plot(*_series(rows, train_key), color=_TRAIN, linewidth=1.4, marker=".", markersize=4)
    if eval_key:
        axes.plot(*_series(rows, eval_key), color=_BLUE, linewidth=2, marker="o", markersize=4.5)
        base = _base_level(rows, eval_key)
        if base is not None:
            axes.axhline(base, color=_GREY, linewidth=1.2, linestyle="--", zorder=1)
    axes.margins(y=0.15)


def _style(axes: Axes, title: str, unit: str, size: float = 12) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=_INK)
    axes.set_xlabel("step", fontsize=size - 2 if size > 10 else 9, color=_INK)
    axes.set_ylabel(unit, fontsize=size - 2 if size > 10 else 9, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12 if size > 10 else 5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6 if size > 10 else 5))
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9 if size > 10 else 8, length=3)
