"""``tea-rl recipes``: what can be trained out of the box."""

from __future__ import annotations

from typing import Annotated

import typer

from tea_rl.cli.common import JsonOption, SetOption, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, resolved with all defaults.")] = None,
    overrides: SetOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print every key with its default and meaning.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, print one, or print the schema.

    Example: [bold]tea-rl recipes quickstart[/bold]
    """
    from tea_rl.recipe import load_recipe, schema_markdown, shipped_recipes

    if schema:
        typer.echo(schema_markdown())
    elif name is not None:
        recipe = load_recipe(name, overrides or [])
        print_json(recipe.model_dump()) if as_json else typer.echo(recipe.to_yaml(), nl=False)
    else:
        descriptions = {key: load_recipe(key).description for key in shipped_recipes()}
        if as_json:
            print_json(descriptions)
            return
        for key, description in descriptions.items():
            typer.echo(f"{key:16} {description}")
