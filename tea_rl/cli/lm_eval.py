"""``tea-rl evaluate --lm-eval``: a head on tasks of the evaluation harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tea_rl.cli.common import load_head, note, print_json
from tea_rl.errors import TeaError

LmEvalOption = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASK,...",
        help="Hand the model with its head to lm-eval instead: names of its tasks, or paths of .yaml files that describe one.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="With --lm-eval: questions of each task; all by default.")
]


def evaluate_tasks(
    head: Path,
    tasks: str,
    strengths: list[float],
    limit: int | None,
    model: str | None,
    as_json: bool,
    beside: str | None = None,
) -> None:
    """Evaluate a head on tasks of the harness, and print a table: tasks and metrics against strengths.

    Args:
        beside: the recipe or environment that was named too, which is refused.

    Raises:
        TeaError: as `tea_rl.evaluation.lm_eval.Tasks`.
    """
    from tea_rl.evaluation.lm_eval import Tasks

    if beside is not None:
        raise TeaError(
            f"--lm-eval brings questions of its own, got {beside} beside it; leave one of the two out"
        )
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise TeaError(f'--lm-eval takes tasks separated by commas, such as arc_easy; got "{tasks}"')
    found = Tasks(names)
    backbone, tea = load_head(head, model)
    rows = found.evaluate(backbone, tea, strengths, limit=limit, notify=note)
    if as_json:
        print_json(rows)
    else:
        _print_table(rows, strengths)


def _print_table(rows: list[dict[str, Any]], strengths: list[float]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("task")
    table.add_column("metric")
    for strength in strengths:
        table.add_column(f"strength {strength:g}", justify="right")
    figures = {(row["task"], row["metric"], row["strength"]): row for row in rows}
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        table.add_row(
            task, metric, *(_figure(figures.get((task, metric, strength))) for strength in strengths)
        )
    Console().print(table)


def _figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    error = row["standard_error"]
    return f"{row['value']:.3f}" + ("" if error is None else f" +-{error:.3f}")
