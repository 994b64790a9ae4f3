"""What commands that ask a head for a return share: the numbers, and whether the head knows what to do with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tea_rl.cli.common import note
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.head.layer import TeaHead


def parse_returns(text: str, option: str) -> list[float]:
    """``"0,0.5,1"`` to numbers.

    Raises:
        TeaError: for anything else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise TeaError(
            f"{option} takes finite numbers in units of the training rewards, separated by commas, such as 0,0.5,1; "
            f'got "{text}"'
        )
    return values


def returns_for(folder: Path, text: str | None, option: str) -> list[float]:
    """The returns that an option asks of a saved head; none if it was left out. Asked before a model is loaded.

    Raises:
        TeaError: for anything but numbers, or a head that never learnt what a return is.
    """
    from tea_rl.head.checkpoint import read_config

    if text is None:
        return []
    values = parse_returns(text, option)
    if not read_config(folder)["head"].get("return_conditioning"):
        raise TeaError(
            f"{option} needs a head with return conditioning, but the one in {folder} has none; leave {option} out, or train one "
            "offline with --set head.return_conditioning=true"
        )
    return values


def note_beyond(tea: TeaHead, values: Sequence[float]) -> None:
    """A line for each asked return that the training never showed."""
    modulation = tea.members.modulation
    for value in values:
        text = None if modulation is None else modulation.beyond_training(value)
        if text is not None:
            note(f"warning: {text}")
