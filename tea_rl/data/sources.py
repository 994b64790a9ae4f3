"""Rows of prompts from lists, files, ``datasets`` and reasoning-gym generators."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tea_rl.data.tables import (
    FILE_READERS,
    check_file,
    empty,
    open_dataset,
    open_table,
    read_lines,
    refuse_kwargs,
)
from tea_rl.errors import TeaError, did_you_mean

_GENERATORS = "reasoning_gym/"


@dataclass(frozen=True)
class Row:
    """A prompt as its source gives it: text or messages, further columns, and where it stands (for errors)."""

    prompt: str | list[dict[str, str]]
    place: str
    columns: dict[str, Any] = field(default_factory=dict)


def read_rows(
    source: str | list[str], kwargs: Mapping[str, Any], size: int, seed: int, key: str = "data.prompts"
) -> list[Row]:
    """Read every row of a source.

    Args:
        source: inline prompts, a file, a ``datasets`` folder or Hub id, or ``reasoning_gym/NAME``.
        kwargs: settings of a generator or dataset.
        size, seed: for generators.
        key: the recipe's key that gave the source, for errors.

    Raises:
        TeaError: if there is no such source, it holds no prompt, or a row is malformed (named by file and row).
    """
    if isinstance(source, str) and source.startswith(_GENERATORS):
        rows = _read_generator(source.removeprefix(_GENERATORS), kwargs, size, seed)
    elif isinstance(source, list):
        refuse_kwargs(kwargs, "a list of prompts")
        rows = [Row(text, f"{key}.{index}") for index, text in enumerate(source)]
    elif (path := Path(source)).suffix.lower() == ".txt":
        refuse_kwargs(kwargs, "a text file")
        check_file(path, key, "prompt")
        # White space around a prompt is a slip of the editor that would change its tokens.
        rows = [Row(line.strip(), f"{path} line {number}") for number, line in read_lines(path)]
    elif path.suffix.lower() in FILE_READERS:
        refuse_kwargs(kwargs, "a file")
        check_file(path, key, "prompt")
        rows = _rows_of(open_table(path, "prompt"), str(path))
    else:
        rows = _rows_of(open_dataset(source, kwargs, key, "prompt"), source)
    if not rows:
        raise TeaError(empty(str(source), "prompt"))
    return rows


def _rows_of(table: Any, source: str) -> list[Row]:
    columns: list[str] = table.column_names
    if "prompts" in columns or "completions" in columns:
        raise TeaError(
            f'{source}: a column "prompts" or "completions" would hide what rewards are given under that name; rename it.'
        )
    if "prompt" not in columns:
        close = difflib.get_close_matches("prompt", columns, n=1)
        mend = f'rename "{close[0]}"' if close else "rename the column that holds the prompts"
        raise TeaError(f'{source}: expected a column "prompt", got {", ".join(columns) or "none"}; {mend}.')
    rows = []
    for number, entry in enumerate(table, 1):
        place = f"{source} row {number}"
        others = {name: value for name, value in entry.items() if name != "prompt"}
        rows.append(Row(check_prompt(entry["prompt"], place), place, others))
    return rows


def check_prompt(value: Any, place: str) -> str | list[dict[str, str]]:
    """A prompt's text, or its messages, ending with the user's turn.

    Raises:
        TeaError: naming ``place``, for anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            raise TeaError(f"{place}: expected a prompt, got blank text; fill or remove the row.")
        return value
    if not isinstance(value, list):
        got = "nothing" if value is None else f"{type(value).__name__} {value!r:.50}"
        raise TeaError(f'{place}: expected "prompt" as text or a list of messages, got {got}.')
    messages = check_messages(value, place)
    if not messages or messages[-1]["role"] == "assistant":
        got = "an assistant's turn at its end" if messages else "none"
        raise TeaError(
            f"{place}: expected messages that end with the user's turn, got {got}; remove it or add a question."
        )
    return messages


def check_messages(value: list[Any], place: str) -> list[dict[str, str]]:
    """Messages with their roles and texts and nothing else.

    Raises:
        TeaError: naming ``place``, for anything that is not a message.
    """
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise TeaError(
                f'{place}: expected messages {{"role": ..., "content": text}}, got {message!r:.80}.'
            )
        messages.append({"role": role, "content": content})
    return messages


def _read_generator(name: str, kwargs: Mapping[str, Any], size: int, seed: int) -> list[Row]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise TeaError('reasoning_gym prompts need a package: pip install "tea-rl[reasoning]".') from None
    if name not in DATASETS:
        raise TeaError(
            f'reasoning_gym has no generator "{name}".{did_you_mean(name, DATASETS)} '
            f"Choose one of its {len(DATASETS)}, such as chain_sum."
        )
    settings = [entry.name for entry in fields(DATASETS[name][1]) if entry.name not in ("seed", "size")]
    for key in kwargs:
        if key not in settings:
            own = (
                "It is set by data.size or data.split_seed."
                if key in ("seed", "size")
                else f"It has: {', '.join(settings)}."
            )
            hint = did_you_mean(key, settings) or " " + own
            raise TeaError(f'data.kwargs: reasoning_gym/{name} has no setting "{key}".{hint}')
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **kwargs)
        entries = [dataset[index] for index in range(size)]
    except Exception as error:  # generators check their settings with assert, or not at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TeaError(
            f"data.kwargs: reasoning_gym/{name} refuses these settings: {reason}; got {dict(kwargs)}."
        ) from error
    return [
        Row(
            entry["question"],
            f"reasoning_gym/{name} row {index}",
            {"answer": entry["answer"], "metadata": entry.get("metadata", {})},
        )
        for index, entry in enumerate(entries)
    ]
