"""``tea-rl evaluate``: a saved head on a recipe's held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def evaluate(
    recipe: Annotated[str, typer.Argument(help="The recipe whose held-out prompts and rewards are used.")],
    head: HeadOption,
    strength: Annotated[
        str, typer.Option("--strength", help="Strengths to evaluate; 0 is the base model.")
    ] = "0,1",
    num_generations: Annotated[
        int | None, typer.Option(min=1, help="Sampled completions for each prompt; the recipe's by default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the sampling; the recipe's by default.")
    ] = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a trained head against the base model.

    Example: [bold]tea-rl evaluate quickstart --head runs/demo/head --strength 0,0.5,1[/bold]
    """
    from tea_rl.errors import TeaError
    from tea_rl.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    strengths = parse_strengths(strength)
    from tea_rl.rewards import load_rewards

    rewards = load_rewards(loaded.rewards, Path(loaded.base_dir))
    loading = loaded.model.model_dump(exclude={"name_or_path"})
    backbone, tea = load_head(head, model or loaded.model.name_or_path, loading)
    from tea_rl.evaluation.evaluate import evaluate as run_evaluation
    from tea_rl.training.online import decode_settings, prepare_prompts

    _, held_out = prepare_prompts(loaded, backbone)
    if not len(held_out):
        raise TeaError(
            f"recipe {loaded.name} holds out no prompts; set data.eval_fraction or data.eval_prompts"
        )
    settings = decode_settings(loaded, num_generations or loaded.train.eval_generations)
    rows = []
    for value in strengths:
        note(f"evaluating strength {value:g} on {len(held_out)} prompts")
        tea.strength = value
        result = run_evaluation(
            backbone, tea, held_out, rewards, settings, loaded.train.seed if seed is None else seed
        )
        rows.append({"strength": value, **result.metrics})
    if as_json:
        print_json(rows)
    else:
        _print_table(rows)


def _print_table(rows: list[dict[str, float]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("metric")
    for row in rows:
        table.add_column(f"strength {row['strength']:g}", justify="right")
    for name in rows[0]:
        if name != "strength":
            table.add_row(name, *(f"{row[name]:.3f}" for row in rows))
    Console().print(table)
