"""The pictures of a comparison: reward against time and reward calls, reward against KL, memory."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tea_rl.compare.claims import mean_frontier
from tea_rl.compare.results import CurvePoint, Results
from tea_rl.compare.summary import BASE, OURS, Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GREY, GRID = "#24292f", "#57606a", "#8b949e", "#e6e8eb"
_OURS_COLOUR, _BASE_COLOUR = "#1f6feb", "#8b949e"
#: Okabe and Ito's palette without the blue and the grey, which are taken.
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7b4ab5", "#56b4e9", "#8c6d31", "#b3123e")
#: Strengths that are written beside the frontier.
_NAMED_STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)


class Picture(NamedTuple):
    """A plot in both forms.

    Attributes:
        name: of the PNG file.
        alt: what it shows, for those who cannot see it.
        svg, png: bytes.
    """

    name: str
    alt: str
    svg: bytes
    png: bytes

    @property
    def address(self) -> str:
        """The SVG as an address that needs no file."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


def method_colours(results: Results) -> dict[str, str]:
    """A colour for each method, the same in every plot and table."""
    others = [method.name for method in results.methods if method.name not in (OURS, BASE)]
    colours = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)}
    return {OURS: _OURS_COLOUR, BASE: _BASE_COLOUR, **colours}


def draw_all(results: Results, summary: Summary) -> list[Picture]:
    """Every plot that there are figures for."""
    colours = method_colours(results)
    rows = [row for row in summary.rows if row.finished]
    drawn = [
        _reward_plot(rows, colours, results.levels, _by_seconds),
        _reward_plot(rows, colours, results.levels, _by_calls),
        _frontier_plot(rows, colours, results.guards.kl_budget),
        _memory_plot(rows, colours),
    ]
    return [picture for picture in drawn if picture is not None]


class _Course(NamedTuple):
    """What a curve is drawn against."""

    name: str
    label: str
    alt: str
    read: Callable[[CurvePoint], float]


_by_seconds = _Course(
    "reward-time", "seconds of training (log scale)", "Held-out reward against seconds of training",
    lambda point: point.seconds,
)  # fmt: skip
_by_calls = _Course(
    "reward-calls", "completions scored for training (log scale)", "Held-out reward against scored completions",
    lambda point: float(point.reward_calls),
)  # fmt: skip


def _reward_plot(
    rows: Sequence[Row], colours: dict[str, str], levels: Sequence[float], course: _Course
) -> Picture | None:
    """Mean over seeds as a line, least to most of the seeds as a band, on a logarithmic axis: distances are ratios."""
    curves = {row.name: _curves(row, course.read) for row in rows}
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return None
    figure, axes = _figure(course.label, "held-out reward")
    _logarithmic(axes)
    _draw_base(axes, rows)
    for level in levels:
        axes.axhline(level, color=GREY, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
    ends = []
    for name, found in curves.items():
        grid = np.unique(np.concatenate([x for x, _ in found]))
        values = np.stack([np.interp(grid, x, y) for x, y in found])
        ours = name == OURS
        axes.plot(
            grid, values.mean(axis=0), color=colours[name], linewidth=2.8 if ours else 1.9, zorder=4 if ours else 3,
            marker="o", markersize=3.6 if ours else 2.6,
        )  # fmt: skip
        if len(found) > 1:
            axes.fill_between(
                grid,
                values.min(axis=0),
                values.max(axis=0),
                color=colours[name],
                alpha=0.16,
                linewidth=0,
                zorder=2,
            )
        ends.append((float(grid[-1]), float(values.mean(axis=0)[-1]), name))
    _label_ends(axes, ends, colours)
    return _finish(figure, course.name, f"{course.alt}, a line a method")


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _curves(row: Row, read: Callable[[CurvePoint], float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions above 0 (the axis is logarithmic) and rewards of each seed."""
    found = []
    for seed in row.method.seeds:
        points = {
            read(point): point.reward
            for point in seed.curve
            if read(point) > 0 and math.isfinite(point.reward)
        }
        if points:
            places = sorted(points)
            found.append((np.array(places), np.array([points[place] for place in places])))
    return found


def _draw_base(axes: Axes, rows: Sequence[Row]) -> None:
    """The original model as a dashed line, best-of-n as a dotted one: neither has a course."""
    for row in rows:
        if not row.trained and math.isfinite(row.reward.mean):
            style = "--" if row.name == BASE else (0, (6, 2, 1, 2))
            axes.axhline(row.reward.mean, color=GREY, linewidth=1.3, linestyle=style, zorder=1)
            axes.annotate(
                row.name, (0, row.reward.mean), xycoords=("axes fraction", "data"), xytext=(4, 3),
                textcoords="offset points", color=SOFT, fontsize=9,
            )  # fmt: skip


def _label_ends(axes: Axes, ends: list[tuple[float, float, str]], colours: dict[str, str]) -> None:
    """Names at the right edge, beside their lines' ends and moved apart where they would overlap."""
    axes.margins(x=0.04, y=0.1)
    low, high = axes.get_ylim()
    gap = (high - low) * 0.062
    places: list[float] = []
    for _, value, _ in (ordered := sorted(ends, key=lambda end: end[1])):
        places.append(max(value, places[-1] + gap) if places else value)
    overshoot = max(0.0, (places[-1] - high) if places else 0.0)
    for (x, value, name), place in zip(ordered, places, strict=True):
        axes.annotate(
            name, (x, value), xycoords="data", xytext=(1.02, place - overshoot), textcoords=("axes fraction", "data"),
            color=colours[name], fontsize=10, fontweight="bold" if name == OURS else "normal", va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.6, "alpha": 0.5},
        )  # fmt: skip


def _frontier_plot(rows: Sequence[Row], colours: dict[str, str], budget: float) -> Picture | None:
    """Ours by strength as a line, every method as a point with its interval."""
    placed = [row for row in rows if math.isfinite(row.kl) and math.isfinite(row.reward.mean)]
    if not any(row.trained for row in placed):
        return None
    figure, axes = _figure("KL to the base model (nats a token)", "held-out reward")
    largest = max(row.kl for row in placed)
    for row in placed:
        frontier = mean_frontier(row)
        largest = max([largest, *(point.kl for point in frontier)])
        axes.plot(
            [point.kl for point in frontier], [point.reward for point in frontier], color=colours[row.name],
            linewidth=2.6, marker="o", markersize=4.5, zorder=3,
        )  # fmt: skip
        for point in frontier:
            if point.strength in _NAMED_STRENGTHS:
                axes.annotate(
                    f"{point.strength:g}", (point.kl, point.reward), xytext=(5, -13), textcoords="offset points",
                    fontsize=8.5, color=colours[row.name],
                )  # fmt: skip
    for row in placed:
        mean, low, high = row.reward
        hollow = not row.trained or not row.sound
        axes.errorbar(
            row.kl, mean, yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], color=colours[row.name],
            marker="D" if row.name == OURS else "o", markersize=8, capsize=3, linewidth=1.4, zorder=5,
            markerfacecolor="white" if hollow else colours[row.name], markeredgewidth=1.8,
        )  # fmt: skip
        text = row.name if row.sound else f"{row.name} (suspect)"
        left = row.kl > 0.7 * largest or row.name == OURS
        axes.annotate(
            text, (row.kl, mean), xytext=(-10 if left else 10, 6), textcoords="offset points", fontsize=10,
            ha="right" if left else "left", color=colours[row.name], fontweight="bold" if row.name == OURS else "normal",
        )  # fmt: skip
    axes.margins(x=0.06, y=0.12)
    if budget < 1.5 * largest:
        axes.axvline(budget, color=GREY, linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            "KL budget", (budget, 0), xycoords=("data", "axes fraction"), xytext=(4, 5), textcoords="offset points",
            fontsize=9, color=SOFT,
        )  # fmt: skip
    return _finish(
        figure, "frontier",
        "Held-out reward against KL to the base model; ours at several strengths as a line, the other methods as points",
    )  # fmt: skip


def _memory_plot(rows: Sequence[Row], colours: dict[str, str]) -> Picture | None:
    measured = [row for row in rows if math.isfinite(row.peak_memory)]
    if not measured:
        return None
    measured.sort(key=lambda row: row.peak_memory, reverse=True)
    figure, axes = _figure("peak memory of the process (GB)", "", height=1.1 + 0.42 * len(measured))
    values = [row.peak_memory / 1e9 for row in measured]
    axes.barh(range(len(measured)), values, color=[colours[row.name] for row in measured], height=0.62)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}",
            (value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=INK,
        )
    axes.set_yticks(range(len(measured)), [row.name for row in measured])
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.1)
    return _finish(figure, "memory", "Peak memory of each method's process, a bar a method")


def _figure(x_label: str, y_label: str, height: float = 4.0) -> tuple[Figure, Axes]:
    # The object interface: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(6.3, height), dpi=150, layout=ConstrainedLayoutEngine(), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, fontsize=10, color=SOFT)
    axes.set_ylabel(y_label, fontsize=10, color=SOFT)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
    return figure, axes


def _finish(figure: Figure, name: str, alt: str) -> Picture:
    import matplotlib

    svg, png = io.BytesIO(), io.BytesIO()
    # A fixed salt and no date: the same figures give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", metadata={"Software": None})
    return Picture(name, alt, svg.getvalue(), png.getvalue())
