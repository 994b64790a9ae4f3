"""``tea-rl rollout``: generate and score completions, and keep them with their states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tea_rl.cli.common import JsonOption, SetOption, quiet_transformers
from tea_rl.cli.embed import StoreOutput, print_store
from tea_rl.cli.progress import WorkDisplay


def rollout(
    recipe: Annotated[str, typer.Argument(help="An online recipe: a shipped one or a YAML file.")],
    output: StoreOutput,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of prompts to generate; train.max_steps by default.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", help="Sample from a saved head instead of the original model.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate completions of a recipe's training prompts and store them with rewards and states.

    Example: [bold]tea-rl rollout quickstart --output stores/quickstart --steps 10[/bold]
    """
    from tea_rl.head.checkpoint import read_config
    from tea_rl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if head is not None:
        read_config(head)  # before the model, so that a wrong folder is answered at once
    quiet_transformers()
    from tea_rl.states.rollouts import write_rollouts

    with WorkDisplay("rolling out") as display:
        store = write_rollouts(loaded, output, steps, display, head=head)
    print_store(store, as_json)
