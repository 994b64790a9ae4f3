"""``tea-rl relabel``: new rewards for stored completions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tea_rl.cli.common import JsonOption
from tea_rl.cli.embed import print_store

if TYPE_CHECKING:
    from tea_rl.recipe import RewardSpec


def relabel(
    store: Annotated[Path, typer.Argument(help="A store made by tea-rl embed or tea-rl rollout.")],
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="NAME[=WEIGHT]",
            help="A built-in reward or path/to/file.py:function. Repeatable.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Take the rewards, with their settings, from a recipe.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Leave the store as it is and make another one here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score the completions of a store anew, without the model.

    Example: [bold]tea-rl relabel stores/quickstart --reward sentiment --reward length=-0.1[/bold]
    """
    from tea_rl.errors import TeaError
    from tea_rl.recipe import load_recipe
    from tea_rl.states.relabel import relabel as run_relabel

    if (recipe is None) == (not rewards):
        raise TeaError("relabelling needs --reward NAME (repeatable) or --recipe RECIPE; give one of them")
    if recipe is not None:
        loaded = load_recipe(recipe)
        specs, base_dir = loaded.rewards, loaded.base_dir
    else:
        specs, base_dir = [parse_reward(text) for text in rewards or []], Path.cwd()
    print_store(run_relabel(store, specs, base_dir, output), as_json)


def parse_reward(text: str) -> RewardSpec:
    """``"sentiment"`` or ``"my.py:polite=0.5"`` to a term.

    Raises:
        TeaError: for a weight that is not a number.
    """
    from tea_rl.errors import TeaError
    from tea_rl.recipe import RewardSpec

    name, equals, weight = text.rpartition("=")
    try:
        return RewardSpec(name=name, weight=float(weight)) if equals else RewardSpec(name=text)
    except ValueError as error:
        raise TeaError(f'--reward takes NAME or NAME=WEIGHT, such as sentiment=0.5; got "{text}"') from error
