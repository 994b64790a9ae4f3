"""``tea-rl sweep``: train many heads from one state store and rank them."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import JsonOption, SetOption, print_json, quiet_transformers
from tea_rl.cli.train import StopOnSignal, TrainingDisplay

if TYPE_CHECKING:
    from tea_rl.training.sweep import SweepResult


def sweep(
    store: Annotated[Path, typer.Argument(help="A state store made by tea-rl embed or tea-rl rollout.")],
    recipe: Annotated[
        str, typer.Argument(help="The recipe of everything that does not vary; its data is the store.")
    ],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid", metavar="KEY=A,B,...", help="Values of one setting. Repeat for every combination."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="New folder for the heads and results.json.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a head for every combination of settings from one store, and rank them on held-out rows.

    Example: [bold]tea-rl sweep stores/mine my_recipe.yaml --grid train.learning_rate=1e-4,3e-4 --output sweeps/mine[/bold]
    """
    from tea_rl.recipe import load_recipe

    values = parse_grid(grid)
    loaded = load_recipe(recipe, overrides or [])
    quiet_transformers()
    from tea_rl.training.sweep import sweep as run_sweep

    started = time.monotonic()
    with StopOnSignal() as stop, TrainingDisplay() as display:
        results = run_sweep(store, loaded, values, output, display, stop)
    if as_json:
        print_json([asdict(result) for result in results])
        return
    _print_ranking(results, list(values))
    typer.echo(f"heads:    {output / 'heads'} ({len(results)} in {time.monotonic() - started:.0f} s)")
    typer.echo(f"results:  {output / 'results.json'}")


def parse_grid(options: list[str]) -> dict[str, list[Any]]:
    """``["head.num_members=1,4", "head.hidden_sizes=[64],[64,64]"]`` to keys and values.

    Raises:
        TeaError: for anything else.
    """
    from tea_rl.errors import TeaError
    from tea_rl.recipe_yaml import parse_yaml

    grid: dict[str, list[Any]] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip()
        # A list of lists in YAML's own form, so that a comma inside brackets or quotes is no separator.
        values = parse_yaml(f"[{text}]", f"--grid {option}") if equals and key and text.strip() else None
        if not values:
            raise TeaError(f'--grid "{option}": expected KEY=A,B,... such as train.learning_rate=1e-4,3e-4')
        if key in grid:
            raise TeaError(f"--grid {key} is given twice; put all its values behind one")
        grid[key] = list(values)
    return grid


def _print_ranking(results: list[SweepResult], keys: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    metric = next((result.metric for result in results if result.metric), "held-out")
    table = Table(title="Heads, best first", box=box.SIMPLE)
    table.add_column("head", justify="right")
    for key in keys:
        last = key.rpartition(".")[2]
        unique = sum(other.rpartition(".")[2] == last for other in keys) == 1
        table.add_column(last if unique else key, justify="right", overflow="fold")
    for title in (metric.removeprefix("eval_"), "95 % interval", "KL", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        settings = [_shown(result.settings[key]) for key in keys]
        if result.problem is not None:
            figures = ["failed", result.problem, "", ""]
        else:
            interval = f"{result.low:.3f}..{result.high:.3f}"
            figures = [
                f"{result.value:.3f}",
                interval,
                f"{result.metrics['eval_kl']:.3f}",
                f"{result.parameters}",
            ]
        table.add_row(str(result.number), *settings, *figures)
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("[", "(").replace("]", ")")
