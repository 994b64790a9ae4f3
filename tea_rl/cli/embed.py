"""``tea-rl embed``: run the backbone over a dataset once and keep what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tea_rl.cli.common import JsonOption, SetOption, print_json, quiet_transformers
from tea_rl.cli.progress import WorkDisplay

if TYPE_CHECKING:
    from tea_rl.states.store import StateStore

StoreOutput = Annotated[
    Path, typer.Option("--output", help="Folder of the store; a killed command continues there.")
]


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
