"""``tea-rl evaluate``: a saved head on a recipe's held-out prompts, or on the held-out starts of its environment."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from tea_rl.cli.common import (
    HeadOption,
    JsonOption,
    ModelOption,
    SetOption,
    load_head,
    note,
    parse_strengths,
    print_json,
)
from tea_rl.cli.env_recipe import EnvOption, recipe_or_env
from tea_rl.cli.envs import KwargsOption
from tea_rl.cli.lm_eval import LimitOption, LmEvalOption, evaluate_tasks
from tea_rl.cli.returns import note_beyond, returns_for

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.evaluation.evaluate import Evaluation
    from tea_rl.head.layer import TeaHead
    from tea_rl.recipe import Recipe

    #: What is evaluated on, how, and the figures to set beside it.
    Measurement: TypeAlias = tuple[str, Callable[[TeaHead], Evaluation], dict[str, float]]

#: Columns beside the strengths: what answers without skill and the expert earn.
_BESIDE = ("constant", "random", "expert")


def evaluate(
    head: HeadOption,
    recipe: Annotated[
        str | None,
        typer.Argument(help="The recipe whose held-out prompts and rewards, or environment, are used."),
    ] = None,
    env: EnvOption = None,
    kwargs: KwargsOption = None,
    strength: Annotated[
        str, typer.Option("--strength", help="Strengths to evaluate; 0 is the base model.")
    ] = "0,1",
    asked: Annotated[
        str | None,
        typer.Option(
            "--returns",
            help="Returns to ask of a head with return conditioning, such as 0,0.5,1: prints achieved against asked.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="With --returns: write achieved against asked to this PNG.")
    ] = None,
    num_generations: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sampled completions (episodes) for each prompt (start); the recipe's by default."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the sampling; the recipe's by default.")
    ] = None,
    lm_eval: LmEvalOption = None,
    limit: LimitOption = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a trained head against the base model.

    Example: [bold]tea-rl evaluate quickstart --head runs/demo/head --strength 0,0.5,1[/bold]

    Example: [bold]tea-rl evaluate --env tea_rl/GuessNumber-v0 --head runs/demo/head[/bold]

    Example: [bold]tea-rl evaluate --lm-eval arc_easy --limit 100 --head runs/demo/head[/bold]
    """
    strengths = parse_strengths(strength)
    if lm_eval is not None:
        evaluate_tasks(head, lm_eval, strengths, limit, model, as_json, recipe or env)
        return
    loaded = recipe_or_env(recipe, env, kwargs, overrides, head)
    returns = returns_for(head, asked, "--returns")
    _check_plot(plot, bool(returns))
    num_generations = num_generations or loaded.train.eval_generations
    prepare = _on_prompts if loaded.env.id is None else _on_episodes
    prepared = prepare(loaded, num_generations, loaded.train.seed if seed is None else seed)
    settings = loaded.model.model_dump(exclude={"name_or_path"})
    backbone, tea = load_head(head, model or loaded.model.name_or_path, settings)
    what, measure, beside = prepared(backbone)
    if returns:
        note_beyond(tea, returns)
        _evaluate_returns(tea, measure, strengths, returns, what, beside, plot, as_json)
        return
    rows = []
    for value in strengths:
        note(f"evaluating strength {value:g} on {what}")
        tea.strength = value
        rows.append({"strength": value, **measure(tea).metrics})
    if as_json:
        print_json([{**row, **beside} for row in rows])
    else:
        _print_table(rows, beside)


def _check_plot(plot: Path | None, with_returns: bool) -> None:
    """Refuse, before minutes of work, a picture that could not be written.

    Raises:
        TeaError: without returns to draw, or for a path that is no place for a file.
    """
    from tea_rl.errors import TeaError

    if plot is None:
        return
    if not with_returns:
        raise TeaError(
            "--plot draws achieved against asked returns and needs --returns, such as 0,0.5,1; got none"
        )
    if plot.is_dir() or not plot.parent.is_dir():
        found = "is a folder" if plot.is_dir() else f"lies in {plot.parent}, which does not exist"
        raise TeaError(f"--plot takes the path of a PNG to write, but {plot} {found}; choose another path")


def _evaluate_returns(
    tea: TeaHead,
    measure: Callable[[TeaHead], Evaluation],
    strengths: list[float],
    returns: list[float],
    what: str,
    beside: dict[str, float],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print what was achieved beside what was asked for, and draw it."""
    from tea_rl.evaluation.returns import measure_returns, write_returns_plot

    rows = measure_returns(tea, measure, strengths, returns, lambda text: note(f"{text} on {what}"))
    if as_json:
        print_json([{**row, **beside} for row in rows])
    else:
        _print_returns(rows)
    if plot is not None:
        write_returns_plot(rows, plot)
        note(f"wrote {plot}")


def _print_returns(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for title in ("strength", "asked", "achieved", "95 %", "greedy", "KL", "samples"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['strength']:g}",
            "" if row["return"] is None else f"{row['return']:g}",
            _figure(row["eval_reward"]),
            "" if math.isnan(row["standard_error"]) else f"+-{1.96 * row['standard_error']:.3f}",
            _figure(row["eval_reward_greedy"]),
            _figure(row["eval_kl"]),
            str(row["samples"]),
        )
    Console().print(table)


def _on_prompts(recipe: Recipe, num_generations: int, seed: int) -> Callable[[Backbone], Measurement]:
    """Held-out prompts; mistakes in the rewards show before the model is loaded."""
    from tea_rl.errors import TeaError
    from tea_rl.rewards import load_rewards

    rewards = load_rewards(recipe.rewards, Path(recipe.base_dir))

    def prepare(backbone: Backbone) -> Measurement:
        from tea_rl.evaluation.evaluate import evaluate
        from tea_rl.training.online import decode_settings, prepare_prompts

        _, held_out = prepare_prompts(recipe, backbone)
        if not len(held_out):
            raise TeaError(
                f"recipe {recipe.name} holds out no prompts; set data.eval_fraction or data.eval_prompts"
            )
        settings = decode_settings(recipe, num_generations)
        return (
            f"{len(held_out)} prompts",
            lambda tea: evaluate(backbone, tea, held_out, rewards, settings, seed),
            {},
        )

    return prepare


def _on_episodes(recipe: Recipe, num_generations: int, seed: int) -> Callable[[Backbone], Measurement]:
    """Held-out starts; mistakes in the environment show before the model is loaded."""
    from tea_rl.errors import TeaError
    from tea_rl.evaluation.episodes import evaluate_episodes, scores_without_skill
    from tea_rl.training.episodes import environment_maker, episode_settings, held_out_starts

    make_env, starts = environment_maker(recipe.env), held_out_starts(recipe.env)
    if not starts:
        raise TeaError(f"recipe {recipe.name} holds out no starts; set env.eval_starts above 0")

    def prepare(backbone: Backbone) -> Measurement:
        settings = episode_settings(recipe)
        return (
            f"{len(starts)} starts",
            lambda tea: evaluate_episodes(backbone, tea, make_env, starts, settings, num_generations, seed),
            scores_without_skill(make_env, starts, note, settings),
        )

    return prepare


def _print_table(rows: list[dict[str, float]], beside: dict[str, float]) -> None:
    """A column for each strength, then what answers without skill and the expert earn, where that is known."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    others = [name for name in _BESIDE if f"eval_{name}_reward" in beside]
    table = Table(box=box.SIMPLE)
    table.add_column("metric")
    for title in [*(f"strength {row['strength']:g}" for row in rows), *others]:
        table.add_column(title, justify="right")
    for name in rows[0]:
        if name != "strength":
            earned = [
                beside[f"eval_{other}_reward"] if name == "eval_reward" else math.nan for other in others
            ]
            table.add_row(name, *(_figure(row[name]) for row in rows), *map(_figure, earned))
    Console().print(table)


def _figure(value: float) -> str:
    """Nothing where nothing was measured."""
    return "" if math.isnan(value) else f"{value:.3f}"
