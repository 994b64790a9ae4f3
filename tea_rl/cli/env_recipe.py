"""What a command takes instead of a recipe: the id of an environment, with settings under which any of them can be played."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.envs import parse_kwargs
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.recipe import Recipe

EnvOption = Annotated[
    str | None,
    typer.Option(
        "--env",
        metavar="ID",
        help="Instead of a recipe: play this environment (see tea-rl envs) as a transcript.",
    ),
]
#: A turn is one line of text. Enough episodes to learn from, in minutes.
_ROLLOUT = {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 16, "stop": ["\n"]}
_STEPS = 4


def recipe_or_env(
    recipe: str | None,
    env: str | None,
    kwargs: Sequence[str] | None,
    overrides: Sequence[str] | None,
    head: Path | None = None,
) -> Recipe:
    """The recipe that a command names, or one around the environment that it names instead.

    Args:
        recipe, env: one of the two.
        kwargs: ``KEY=VALUE`` settings of the environment.
        overrides: ``KEY=VALUE`` settings of the recipe.
        head: a saved head that is to play; around an environment its model and its own settings are taken.

    Raises:
        TeaError: both or neither are given, or something in them is wrong.
    """
    from tea_rl.recipe import load_recipe

    if (recipe is None) == (env is None):
        got = "both" if env is not None else "neither"
        raise TeaError(f"give a recipe or --env ID, such as --env tea_rl/GuessNumber-v0; got {got}")
    if env is not None:
        return env_recipe(env, parse_kwargs(list(kwargs or [])), overrides or [], head)
    if kwargs:
        raise TeaError("--kwargs belongs to --env ID; in a recipe use --set env.kwargs.KEY=VALUE")
    assert recipe is not None
    return load_recipe(recipe, overrides or [])


def env_recipe(
    id: str, kwargs: dict[str, Any], overrides: Sequence[str] = (), head: Path | None = None
) -> Recipe:
    """A recipe around an environment that sets nothing but how much is played, and that a turn is one line.

    Raises:
        TeaError: for a head that is none, or a mistake in the overrides.
    """
    from tea_rl.recipe import ModelConfig, parse_recipe

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", id.rpartition("/")[2]).strip("-.") or "env"
    raw: dict[str, Any] = {
        "name": name,
        "env": {"id": id, "kwargs": kwargs},
        "rollout": dict(_ROLLOUT),
        "train": {"max_steps": _STEPS},
    }
    if head is not None:
        from tea_rl.head.checkpoint import read_config

        config = read_config(head)
        settings = {k: v for k, v in config["base_model_settings"].items() if k in ModelConfig.model_fields}
        raw["head"], raw["model"] = config["head"], settings
        if config.get("base_model_name_or_path"):
            raw["model"]["name_or_path"] = config["base_model_name_or_path"]
    return parse_recipe(raw, f"--env {id}", overrides=overrides)
