"""``tea-rl play``: a person plays a text environment."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tea_rl.cli.common import is_terminal, note
from tea_rl.cli.envs import KwargsOption, parse_kwargs


def play(
    id: Annotated[str, typer.Argument(help="Any gymnasium id with text, such as tea_rl/GuessNumber-v0.")],
    kwargs: KwargsOption = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the start and of luck.")] = None,
    index: Annotated[
        int | None, typer.Option("--index", min=0, help="Number of the start, as in training.")
    ] = None,
    choices: Annotated[
        bool, typer.Option("--choices", help="Show the accepted answers where they are known.")
    ] = False,
) -> None:
    """Play one episode; every line you type is an answer. Ctrl-C or the end of the input leaves.

    Example: [bold]tea-rl play tea_rl/GuessNumber-v0[/bold]
    """
    from tea_rl.envs import make_env

    env = make_env(id, parse_kwargs(kwargs or []))
    total, turns, ending = 0.0, 0, "left"
    try:
        text, info = env.reset(seed=seed, options=None if index is None else {"index": index})
        while ending == "left":
            _show(text, info.get("admissible") if choices else None)
            answer = _read_line()
            if answer is None:
                break
            text, reward, terminated, truncated, info = env.step(answer)
            total, turns = total + float(reward), turns + 1
            if reward:
                note(f"(reward {float(reward):g})")
            if terminated or truncated:
                _show(text, None)
                ending = "over" if terminated else "out of turns"
    except KeyboardInterrupt:
        note("")
    finally:
        env.close()
    typer.echo(f"{ending} after {turns} turn{'' if turns == 1 else 's'}, return {total:g}")


def _show(text: str, choices: list[str] | None) -> None:
    # Python's own stream replaces half surrogate pairs, which a terminal could not print.
    typer.echo(text.encode("utf-8", "replace").decode("utf-8"))
    if choices:
        note(f"accepted: {', '.join(choices)}")


def _read_line() -> str | None:
    if is_terminal():
        sys.stderr.write("> ")
        sys.stderr.flush()
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        return "\ufffd"  # bytes that are no text are an answer no environment accepts
    return line.rstrip("\r\n") if line else None
