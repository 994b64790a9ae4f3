"""Which rows are held out: those a column ``split`` says, or some drawn by distinct prompt, so that no question is on both
sides."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.data.labelled import LabelledRow


#: A column of the data that says itself which rows are held out.
SPLIT_COLUMN = "split"
_SIDES = {"train": 0, "test": 1, "eval": 1, "validation": 1, "held_out": 1}


def split_side(columns: Mapping[str, Any], place: str) -> int:
    """0 for a row to train on and 1 for a held-out one, as its column ``split`` says.

    Raises:
        TeaError: naming ``place``, if it says something else or nothing.
    """
    value = columns.get(SPLIT_COLUMN)
    side = _SIDES.get(value) if isinstance(value, str) else None
    if side is None:
        got = f"{value!r:.60}" if value is not None else "nothing"
        raise TeaError(
            f'{place}: column "{SPLIT_COLUMN}" must be one of {", ".join(_SIDES)} in every row, got {got}; mend it or rename '
            "the column"
        )
    return side


def row_groups(rows: Sequence[LabelledRow]) -> list[int]:
    """A number for each row, counted from 0; rows that must stay on one side of a split share it.

    Rows of one prompt do, both rows of a pair do, and plain texts that are the same do.
    """
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(_key(row), len(numbers)) for row in rows]


def _key(row: LabelledRow) -> Hashable:
    if row.prompt != "":
        return "prompt", json.dumps(row.prompt, ensure_ascii=False)
    return ("pair", row.pair) if row.pair is not None else ("text", row.completion)


def split_groups(groups: Sequence[int], eval_fraction: float, split_seed: int) -> tuple[list[int], list[int]]:
    """Split by group; depends on which groups there are, not on the order of rows.

    Args:
        groups: `row_groups` of the rows.
        eval_fraction: share of groups held out. Above 0 at least one is, and never all.

    Returns:
        Positions of rows to train on and of held-out rows, each ascending.

    >>> split_groups([0, 1, 1, 2], 0.34, split_seed=0)
    ([1, 2, 3], [0])
    """
    distinct = sorted({int(group) for group in groups})
    random.Random(split_seed).shuffle(distinct)
    count = round(len(distinct) * eval_fraction)
    if eval_fraction > 0 and len(distinct) > 1:
        count = min(max(1, count), len(distinct) - 1)
    if count >= len(distinct):
        raise TeaError(
            f"expected at least one row to train on, got none ({len(distinct)} distinct prompts, {count} of them held out "
            "by data.eval_fraction); add rows or hold out fewer."
        )
    heldout = set(distinct[:count])
    sides: tuple[list[int], list[int]] = ([], [])
    for position, group in enumerate(groups):
        sides[int(group) in heldout].append(position)
    return sides


def split_rows(
    rows: Sequence[LabelledRow], eval_fraction: float, split_seed: int
) -> tuple[list[int], list[int]]:
    """`split_groups` of labelled rows: positions of rows to train on, and of held-out rows."""
    return split_groups(row_groups(rows), eval_fraction, split_seed)
