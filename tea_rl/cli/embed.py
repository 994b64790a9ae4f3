"""``tea-rl embed``: run the backbone over a dataset once and keep what it computed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import JsonOption, SetOption, is_terminal, print_json, quiet_transformers
from tea_rl.training.progress import Listener

if TYPE_CHECKING:
    from tea_rl.states.store import StateStore

StoreOutput = Annotated[
    Path, typer.Option("--output", help="Folder of the store; a killed command continues there.")
]
#: Seconds between two lines where no progress bar can be shown.
_LINE_SECONDS = 10.0


def embed(
    recipe: Annotated[str, typer.Argument(help="A recipe with data.dataset: a shipped one or a YAML file.")],
    output: StoreOutput,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the backbone over a recipe's dataset once; training then reads the stored states.

    Example: [bold]tea-rl embed my_recipe.yaml --output stores/mine[/bold]
    """
    from tea_rl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    quiet_transformers()
    from tea_rl.states.embed import embed as run_embedding

    with WorkDisplay("embedding") as display:
        store = run_embedding(loaded, output, display)
    print_store(store, as_json)


def print_store(store: StateStore, as_json: bool) -> None:
    """What a finished store holds, and what to do with it."""
    from tea_rl.states.browse import store_summary

    summary = store_summary(store)
    if as_json:
        print_json(summary)
        return
    cut = summary["notes"].get("truncated")
    typer.echo(
        f"store:   {store.path} ({summary['rows']} rows, {summary['tokens']} tokens, {summary['bytes'] / 1e6:.0f} MB"
        + (f", {cut} rows cut at data.max_length)" if cut else ")")
    )
    typer.echo(f"look:    tea-rl inspect {store.path}")
    typer.echo(f"train:   tea-rl train RECIPE --store {store.path}")


class WorkDisplay(Listener):
    """A bar with rate and time left for work of known size; plain lines where no terminal is."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.what = what
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not is_terminal(),
        )
        self.task: Any = None
        self.told = 0.0

    def __enter__(self) -> WorkDisplay:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def on_note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def on_progress(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if self.task is None:
            # What an earlier, killed command did says nothing about this one's speed.
            self.before, self.started, self.told = done, now, now
            self.task = self.bar.add_task(self.what, total=total, completed=done, figures="")
            return
        rate = (done - self.before) / max(now - self.started, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        figures = f"{done}/{total} {unit}  {rate:.0f} {unit}/s  {_duration(left)} left"
        self.bar.update(self.task, completed=done, figures=figures)
        if self.bar.disable and (done >= total or now - self.told >= _LINE_SECONDS):
            self.told = now
            self.on_note(f"{self.what}  {figures}")


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "? s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
