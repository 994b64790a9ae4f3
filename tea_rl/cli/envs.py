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
    as_json: JsonOption = False,
) -> None:
    """List the text environments, or check one: prompt, rules, what constant, random and expert answers earn.

    Exits with 2 when the environment breaks a rule.

    Example: [bold]tea-rl envs tea_rl/GuessNumber-v0 --kwargs high=64[/bold]
    """
    settings = parse_kwargs(kwargs or [])
    if id is None:
        if settings:
            raise TeaError("--kwargs belongs to an environment: name one, such as tea_rl/GuessNumber-v0")
        _list(as_json)
        return
    from tea_rl.envs.checking import check_text_env

    report = check_text_env(id, settings, episodes)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
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
