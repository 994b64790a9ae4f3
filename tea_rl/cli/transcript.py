"""An episode for people: what the environment said, what the model answered, and what each answer earned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Why an episode was cut, by `tea_rl.rollout.Episode.reason`.
_CUTS = {
    "environment": "cut by the environment",
    "turns": "cut: env.max_turns is reached",
    "context": "cut: the context is full",
}


def transcript_lines(turns: Sequence[Mapping[str, Any]], ending: Mapping[str, Any]) -> list[str]:
    """An episode turn by turn.

    Args:
        turns: each with ``turn``, ``observation``, ``completion``, ``reward`` (of this turn) and ``invalid``; ``return`` (from
            this turn on) where it is known.
        ending: ``final_observation``, and ``failed`` and ``cut`` where there is something to say.
    """
    lines = []
    for turn in turns:
        earned = [f"reward {turn['reward']:+.3f}"]
        if turn.get("return") is not None:
            earned.append(f"return from here {turn['return']:+.3f}")
        earned += ["invalid"] if turn["invalid"] else []
        lines.append(f"turn {turn['turn']}, {', '.join(earned)}")
        lines += [f"  | {line}" for line in printable_lines(turn["observation"])]
        lines += [f"  > {line}" for line in printable_lines(turn["completion"])]
    if ending.get("failed"):
        return [*lines, f"failed: {' '.join(printable_lines(ending['failed']))}"]
    lines.append(_CUTS.get(ending.get("cut") or "", "end"))
    return lines + [f"  | {line}" for line in printable_lines(ending.get("final_observation") or "")]


def episode_title(name: str, total: float | None, num_turns: int) -> str:
    """``trained, return +1.000 after 3 turns``."""
    known = total is not None and not math.isnan(total)
    return f"{name}, return {f'{total:+.3f}' if known else '-'} after {num_turns} turn{'' if num_turns == 1 else 's'}"


def printable_lines(text: str) -> list[str]:
    """Lines of a text, printable; what a model wrote may hold anything, also what moves a terminal's cursor."""
    lines = text.strip("\n").split("\n")
    return ["".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line) for line in lines]
