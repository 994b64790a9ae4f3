"""``tea-rl envs``: the text environments, and a look at one before training on it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import JsonOption, print_json
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.envs.checking import EnvReport

KwargsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kwargs",
        metavar="KEY=VALUE",
        help="A setting of the environment, such as --kwargs high=64. Repeatable.",
    ),
]


def envs(
    id: Annotated[
        str | None, typer.Argument(help="Look this environment over: any gymnasium id with text.")
    ] = None,
    kwargs: KwargsOption = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes behind each score.")] = 100,
    play_base: Annotated[
        bool, typer.Option("--play-base", help="Also show an episode that the base model plays.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="The base model that plays: Hub id, folder or .gguf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the text environments, or check one: prompt, rules, what constant, random and expert answers earn.

    Exits with 2 when the environment breaks a rule.

    Example: [bold]tea-rl envs tea_rl/GuessNumber-v0 --kwargs high=64[/bold]
    """
    settings = parse_kwargs(kwargs or [])
    if model is not None and not play_base:
        raise TeaError("--model names who plays; add --play-base, or leave it out")
    if id is None:
        if play_base:
            raise TeaError("--play-base belongs to an environment: name one, such as tea_rl/GuessNumber-v0")
        if settings:
            raise TeaError("--kwargs belongs to an environment: name one, such as tea_rl/GuessNumber-v0")
        _list(as_json)
        return
    from tea_rl.envs.checking import check_text_env

    report = check_text_env(id, settings, episodes)
    played = _play_base(id, settings, model) if play_base else None
    if as_json:
        print_json(report.to_dict() | ({} if played is None else {"episode": played}))
    else:
        _print(report)
        if played is not None:
            _print_episode(played)
    if not report.ok:
        raise TeaError(f"{id} breaks {len(report.problems)} rule(s); the first: {report.problems[0]}")


def parse_kwargs(options: list[str]) -> dict[str, Any]:
    """``["high=64", "is_slippery=true"]`` to settings; values are read as YAML.

    Raises:
        TeaError: for anything else, or a key given twice.
    """
    from tea_rl.recipe_yaml import parse_yaml

    settings: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip()
        if not equals or not key:
            raise TeaError(f'--kwargs takes KEY=VALUE, such as high=64; got "{option}"')
        if key in settings:
            raise TeaError(f"--kwargs {key} is given twice; keep one")
        settings[key] = parse_yaml(text, f"--kwargs {option}")
    return settings


def _play_base(id: str, kwargs: dict[str, Any], model: str | None) -> dict[str, Any]:
    """The base model's sampled episode of start 0, as a recipe would play it that sets nothing else."""
    from tea_rl.cli.common import note, quiet_transformers
    from tea_rl.recipe import parse_recipe

    raw: dict[str, Any] = {"env": {"id": id, "kwargs": kwargs}, "rollout": {"stop": ["\n"]}}
    recipe = parse_recipe(raw | ({"model": {"name_or_path": model}} if model else {}), "tea-rl envs")
    quiet_transformers()
    from tea_rl.backbone import load_backbone
    from tea_rl.head.layer import TeaHead
    from tea_rl.rollout import EpisodeStart, run_episodes
    from tea_rl.training.episodes import environment_maker, episode_settings

    make_env = environment_maker(recipe.env)
    backbone = load_backbone(**recipe.model.model_dump(), notify=note)
    head = TeaHead.for_backbone(backbone, recipe.head)
    batch = run_episodes(backbone, head, make_env, [EpisodeStart(0)], episode_settings(recipe))
    (episode,) = batch.episodes
    turns = [
        {key: getattr(turn, key) for key in ("observation", "completion", "reward", "invalid")}
        for turn in batch.turns
    ]
    return {
        "model": backbone.name_or_path,
        "turns": turns,
        "final_observation": episode.final_observation,
        "return": episode.total_reward,
        "failed": episode.failed,
        "cut": episode.reason,
    }


def _print_episode(played: dict[str, Any]) -> None:
    """A transcript: what the environment says as it is, the model's lines behind a mark."""
    typer.echo(f"\nan episode of {played['model']}:\n")
    for turn in played["turns"]:
        typer.echo(_printable(turn["observation"]))
        said = _printable(turn["completion"]).strip("\n").splitlines() or ["(nothing)"]
        told = ", ".join(
            [
                *([f"reward {turn['reward']:g}"] if turn["reward"] else []),
                *(["invalid"] if turn["invalid"] else []),
            ]
        )
        for line in said[:-1]:
            typer.echo(f">>> {line}")
        typer.echo(f">>> {said[-1]}" + (f"   ({told})" if told else ""))
    if played["failed"] is not None:
        typer.echo(f"\nthe environment failed: {played['failed']}")
        return
    typer.echo(_printable(played["final_observation"]))
    turns = len(played["turns"])
    cut = f", cut by {played['cut']}" if played["cut"] else ""
    typer.echo(f"\nreturn {played['return']:g} after {turns} turn{'' if turns == 1 else 's'}{cut}")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _list(as_json: bool) -> None:
    from tea_rl.envs import list_envs

    entries = list_envs()
    if as_json:
        print_json([asdict(entry) | {"available": entry.available} for entry in entries])
        return
    for entry in entries:
        missing = "" if entry.available else " (needs: pip install 'tea-rl[envs]')"
        typer.echo(f"{entry.id:24} {entry.summary}{missing}")


def _print(report: EnvReport) -> None:
    typer.echo(f"prompt of start 0:\n\n{report.prompt}\n")
    if report.admissible:
        choices = ", ".join(report.admissible[:20])
        more = f", ... ({len(report.admissible)} in all)" if len(report.admissible) > 20 else ""
        typer.echo(f"accepted answers: {choices}{more}\n")
    typer.echo(str(report))
