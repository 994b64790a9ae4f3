"""``tea-rl rollout``: generate and score completions, or play episodes, and keep them with their states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tea_rl.cli.common import JsonOption, SetOption, quiet_transformers
from tea_rl.cli.embed import StoreOutput, print_store
from tea_rl.cli.env_recipe import EnvOption, recipe_or_env
from tea_rl.cli.envs import KwargsOption
from tea_rl.cli.progress import WorkDisplay


def rollout(
    output: StoreOutput,
    recipe: Annotated[
        str | None, typer.Argument(help="An online recipe: a shipped one or a YAML file.")
    ] = None,
    env: EnvOption = None,
    kwargs: KwargsOption = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of prompts (starts) to generate; train.max_steps by default."),
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", help="Sample from a saved head instead of the original model.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate completions of a recipe's training prompts, or play an environment, and store that with rewards and states.

    Of an episode every turn is a row, whose reward is the return from there on.

    Example: [bold]tea-rl rollout quickstart --output stores/quickstart --steps 10[/bold]

    Example: [bold]tea-rl rollout --env tea_rl/GuessNumber-v0 --output stores/guess[/bold]
    """
    from tea_rl.head.checkpoint import read_config

    loaded = recipe_or_env(recipe, env, kwargs, overrides, head)
    if head is not None:
        read_config(head)  # before the model, so that a wrong folder is answered at once
    quiet_transformers()
    from tea_rl.states.rollouts import write_rollouts

    with WorkDisplay("rolling out") as display:
        store = write_rollouts(loaded, output, steps, display, head=head)
    print_store(store, as_json)
