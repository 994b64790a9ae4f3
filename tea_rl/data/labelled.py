"""Labelled rows: completions with what is known about them, read from any of the formats people have.

The format is seen from the columns, which are TRL's, and must be the same in every row:

    prompt, completion              prompt_completion   (``reward`` may stand beside; without a prompt it is ``text``)
    messages                        messages            (the last turn, the assistant's, is the completion)
    [prompt,] chosen, rejected      preference          (two rows of a pair)
    prompt, completion, label       label
    text, or lines of a .txt file   text                (``reward`` may stand beside; an empty prompt says the same)
    any with a reward tag in it     tagged              (see `tea_rl.data.tags`)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from tea_rl.data.formats import READERS, Message, read_pair, shown
from tea_rl.data.records import Record, read_records
from tea_rl.data.split import SPLIT_COLUMN, row_groups, split_groups, split_rows, split_side
from tea_rl.data.tables import empty
from tea_rl.data.tags import UNTAGGED_REWARD, read_tag, unknown_tag
from tea_rl.errors import TeaError, did_you_mean

__all__ = [
    "COLUMNS",
    "LabelledData",
    "LabelledRow",
    "Message",
    "read_labelled",
    "row_groups",
    "scan_labelled",
    "split_groups",
    "split_rows",
]

#: Columns with a meaning; any other is handed to rewards.
COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected", "text", "reward", "label")
_EXPECTED = "expected columns prompt and completion, or messages, or chosen and rejected, or text (reward or label beside them)"
#: Rewards are kept in single precision.
_LARGEST_REWARD = 3.4e38
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class LabelledRow:
    """A completion and what is known about it.

    Attributes:
        prompt: text, or messages that end with the user's turn; "" for plain text, which is all completion.
        completion: what follows the prompt, without reward tag.
        reward: the larger the better; None without one.
        label: good or bad; None without one.
        pair: index of the preference pair the row belongs to.
        chosen: whether it is the better one of its pair.
        place: file and line, for people.
        columns: further columns, handed to rewards.
    """

    prompt: str | list[Message]
    completion: str
    reward: float | None = None
    label: bool | None = None
    pair: int | None = None
    chosen: bool | None = None
    place: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class LabelledData:
    """The rows of a source.

    Attributes:
        format: prompt_completion, messages, preference, label, text or tagged.
        untagged: rows without a tag in a tagged source; their reward is 1.
    """

    format: str
    rows: list[LabelledRow]
    source: str
    untagged: int = 0


def read_labelled(source: str, kwargs: Mapping[str, Any], columns: Mapping[str, str]) -> LabelledData:
    """Read every row of a labelled source.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file, a ``datasets`` folder or Hub id, or
            ``tea_rl/NAME``.
        kwargs: name, split, data_dir, revision of a dataset.
        columns: the source's names of columns where they differ from ours: ``{"completion": "text"}``.

    Raises:
        TeaError: if the source cannot be read, or for the first bad row, by file and line.
    """
    data, problems = scan_labelled(source, kwargs, columns)
    if problems:
        more = f" ({len(problems) - 1} more bad rows: tea-rl data check lists them)" if problems[1:] else ""
        raise TeaError(problems[0] + more)
    return data


def scan_labelled(
    source: str,
    kwargs: Mapping[str, Any],
    columns: Mapping[str, str],
    source_key: str = "data.dataset",
    columns_key: str = "data.columns",
) -> tuple[LabelledData, list[str]]:
    """`read_labelled` that goes on after a bad row.

    Args:
        source, kwargs, columns: as there.
        source_key, columns_key: what gave source and columns, for errors.

    Returns:
        The good rows, and one line about each bad row, in order.

    Raises:
        TeaError: if the source as a whole cannot be read, or has no row.
    """
    for name in columns:
        if name not in COLUMNS:
            raise TeaError(
                f'{columns_key}: there is no column "{name}".{did_you_mean(name, COLUMNS)} Ours are {", ".join(COLUMNS)}.'
            )
    reader = _Reader(columns, columns_key)
    problems: list[str] = []
    for record in read_records(source, kwargs, source_key):
        try:
            reader.add(record)
        except TeaError as error:
            problems.append(str(error))
    if not reader.rows and not problems:
        raise TeaError(empty(source, "row"))
    rows, untagged = reader.rows, 0
    if reader.tagged:
        problems += [f"{place}: {unknown_tag(tag)}" for place, tag in reader.doubtful]
        untagged = sum(row.reward is None for row in rows)
        rows = [replace(row, reward=UNTAGGED_REWARD) if row.reward is None else row for row in rows]
    problems += _bad_splits(rows)
    return LabelledData(
        "tagged" if reader.tagged else reader.format or "text", rows, source, untagged
    ), problems


def _bad_splits(rows: Sequence[LabelledRow]) -> list[str]:
    """One line about each row whose column ``split`` says nothing known, in data where a row has that column."""
    problems: dict[str, str] = {}  # both rows of a pair have one place
    for row in rows if any(SPLIT_COLUMN in row.columns for row in rows) else ():
        try:
            split_side(row.columns, row.place)
        except TeaError as error:
            problems[row.place] = str(error)
    return list(problems.values())


class _Reader:
    """Turns records into rows, one after another; holds what must be the same in all of them."""

    def __init__(self, columns: Mapping[str, str], columns_key: str) -> None:
        self.columns, self.columns_key = columns, columns_key
        self.rows: list[LabelledRow] = []
        self.format: str | None = None
        self.first = ""
        self.rewarded = False
        self.pairs = 0
        self.tagged = False
        self.doubtful: list[tuple[str, str]] = []

    def add(self, record: Record) -> None:
        """Append the rows of a record.

        Raises:
            TeaError: naming the record's place; nothing is appended then.
        """
        place = record.place
        if record.problem is not None:
            raise TeaError(f"{place}: {record.problem}")
        values = self._renamed(record)
        format = _format_of(values, place)
        if self.format in ("prompt_completion", "label") and format in ("text", "prompt_completion"):
            # The same columns with nothing in one of them: that is what its reader will say.
            format = self.format if {"prompt", "label"} & values.keys() else format
        rewarded = values.get("reward") is not None
        if self.format is None:
            self.format, self.first, self.rewarded = format, place, rewarded
        elif format != self.format:
            raise TeaError(
                f"{place}: mixed formats: expected {self.format} as in {self.first}, got {format}; give each format a file "
                "of its own."
            )
        others = {name: value for name, value in values.items() if name not in COLUMNS}
        if format == "preference":
            self._add_pair(values, others, place)
            return
        if rewarded != self.rewarded:
            first = "a reward" if self.rewarded else "no reward"
            got = "a reward" if rewarded else "none"
            raise TeaError(
                f"{place}: expected {first} as in {self.first}, got {got}; give every row a reward or none."
            )
        prompt, completion = READERS[format](values, place)
        reward = _reward(values["reward"], record) if rewarded else None
        label: bool | None = None
        if format == "label" or isinstance(values.get("label"), bool):
            label = _label(values.get("label"), record)
        elif values.get("label") is not None:
            others["label"] = values["label"]  # the classes of a text, say
        completion, tag_reward = self._untag(completion, reward, place)
        if prompt == "":
            completion = completion.strip() if tag_reward is not None else completion
        if not completion.strip():
            raise TeaError(f"{place}: expected a completion, got blank text; fill or remove the row.")
        reward = tag_reward if tag_reward is not None else reward
        self.rows.append(LabelledRow(prompt, completion, reward, label, None, None, place, others))

    def _renamed(self, record: Record) -> dict[str, Any]:
        """The record's columns under our names."""
        values = dict(record.values)
        for ours, theirs in self.columns.items():
            if theirs not in record.values:
                hint = did_you_mean(theirs, record.values) or f" It has {', '.join(record.values)}."
                raise TeaError(f'{record.place}: no column "{theirs}" ({self.columns_key}: {ours}).{hint}')
        for theirs in self.columns.values():
            values.pop(theirs, None)
        values.update({ours: record.values[theirs] for ours, theirs in self.columns.items()})
        for name in ("prompts", "completions"):
            if name in values:
                raise TeaError(
                    f'{record.place}: a column "{name}" would hide what rewards are given under that name; rename it.'
                )
        return values

    def _add_pair(self, values: Mapping[str, Any], others: dict[str, Any], place: str) -> None:
        if values.get("reward") is not None:
            others = {**others, "reward": values["reward"]}
        prompt, chosen, rejected = read_pair(values, place)
        for completion, better in ((chosen, True), (rejected, False)):
            self.rows.append(LabelledRow(prompt, completion, None, None, self.pairs, better, place, others))
        self.pairs += 1

    def _untag(self, completion: str, reward: float | None, place: str) -> tuple[str, float | None]:
        """The completion without its tag, and the tag's reward."""
        if self.format == "label":
            return completion, None
        if reward is not None and "<r" not in completion:
            return completion, None  # beside a reward, <1> is just text
        found = read_tag(completion, place, beside_reward=reward is not None)
        if reward is not None:
            if found.reward is not None:
                raise TeaError(f"{place}: expected a reward or a tag, got both; remove one.")
            return completion, None
        if found.doubtful is not None:
            self.doubtful.append((place, found.doubtful))
        self.tagged = self.tagged or found.reward is not None
        return found.text, found.reward


def _format_of(values: Mapping[str, Any], place: str) -> str:
    """The format a row's columns show.

    Empty columns count only when nothing else tells: in a table every row has every column.
    """
    given = {name for name in COLUMNS if values.get(name) is not None}
    for names in (given, set(COLUMNS) & values.keys()):
        if {"chosen", "rejected"} <= names:
            format, optional = "preference", {"prompt"}
        elif "messages" in names:
            format, optional = "messages", {"reward"}
        elif names & {"chosen", "rejected"}:
            format, optional = "preference", {"prompt", "chosen", "rejected"}
        elif "completion" in names:
            named = "label" if "label" in names else "prompt_completion"
            format, optional = named if "prompt" in names else "text", {"prompt", "reward", "label"}
        elif "text" in names:
            format, optional = "text", {"reward"}
        else:
            continue
        _refuse_slip(values, optional - names, place)
        return format
    listed = ", ".join(map(str, values)) or "none"
    slip = next((hint for name in values if (hint := did_you_mean(name, set(COLUMNS) - given))), "")
    raise TeaError(f"{place}: {_EXPECTED}, got {listed}; rename them or set data.columns.{slip}")


def _refuse_slip(values: Mapping[str, Any], missing: set[str], place: str) -> None:
    """Refuse a column that is nearly called like a missing one, rather than learn without it."""
    slip = _find_slip(tuple(map(str, values)), frozenset(missing))
    if slip is not None:
        name, ours = slip
        raise TeaError(
            f'{place}: expected a column "{ours}", got "{name}"; rename it or set data.columns {{{ours}: {name}}}.'
        )


@lru_cache(maxsize=64)  # rows have the same few sets of columns
def _find_slip(names: tuple[str, ...], missing: frozenset[str]) -> tuple[str, str] | None:
    for name in names:
        for ours in difflib.get_close_matches(name, missing, n=1, cutoff=0.8):
            # a plural is another word: "labels" may well hold something else
            if name not in COLUMNS and name != ours + "s" and abs(len(name) - len(ours)) < 2:
                return name, ours
    return None


def _reward(value: Any, record: Record) -> float:
    number = value
    if isinstance(value, str) and not record.typed:
        try:
            number = float(value)
        except ValueError:
            number = value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TeaError(f"{record.place}: expected a number as reward, got {shown(value)}; mend it.")
    try:
        reward = float(number)
    except OverflowError:
        reward = math.inf
    if not abs(reward) <= _LARGEST_REWARD:  # NaN compares as false
        raise TeaError(f"{record.place}: expected a finite reward, got {reward:g}; mend or remove the row.")
    return reward


def _label(value: Any, record: Record) -> bool:
    known = _TRUTH.get(value.lower()) if isinstance(value, str) and not record.typed else None
    known = bool(value) if value in (0, 1) and not isinstance(value, str) else known
    if known is None:
        raise TeaError(
            f"{record.place}: expected true or false as label, got {shown(value)}; mend it (numbers are rewards)."
        )
    return known
