"""Prompts and completions out of a row's columns, one function a format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tea_rl.data.sources import check_messages, check_prompt
from tea_rl.errors import TeaError

Message = dict[str, str]


def _read_completion_row(values: Mapping[str, Any], place: str) -> tuple[str | list[Message], str]:
    prompt = _prompt(values.get("prompt"), place)
    completion = values.get("completion")
    if isinstance(completion, list):
        return _as_messages(prompt, place), _last_turn(completion, "completion", place)
    return prompt, _text(completion, "completion", place)


def _read_messages(values: Mapping[str, Any], place: str) -> tuple[str | list[Message], str]:
    value = values["messages"]
    if not isinstance(value, list):
        raise TeaError(f'{place}: expected "messages" as a list of messages, got {shown(value)}.')
    messages = check_messages(value, place)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        got = f"{len(messages)} message(s)" if len(messages) < 2 else f"a {messages[-1]['role']}'s turn"
        raise TeaError(
            f"{place}: expected messages that end with the assistant's turn after another, got {got}; add or remove turns."
        )
    return messages[:-1], messages[-1]["content"]


def _read_text(values: Mapping[str, Any], place: str) -> tuple[str | list[Message], str]:
    name = "completion" if values.get("completion") is not None else "text"
    return "", _text(values.get(name), name, place)


#: Prompt and completion of a row, by its format.
READERS = {
    "prompt_completion": _read_completion_row,
    "label": _read_completion_row,
    "messages": _read_messages,
    "text": _read_text,
}


def read_pair(values: Mapping[str, Any], place: str) -> tuple[str | list[Message], str, str]:
    """Prompt, chosen and rejected completion; a prompt that is not given is what both begin with."""
    chosen, rejected = values.get("chosen"), values.get("rejected")
    prompt: str | list[Message]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _pair_of_messages(values.get("prompt"), chosen, rejected, place)
    else:
        chosen, rejected = _text(chosen, "chosen", place), _text(rejected, "rejected", place)
        if values.get("prompt") is not None:
            prompt = _prompt(values["prompt"], place)
        else:
            # One character less than either, so that no completion is empty; then back to the end of a word.
            shared = len(_common_prefix(chosen[:-1], rejected[:-1]))
            shared = max(chosen.rfind(" ", 0, shared), 0)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if chosen == rejected:
        raise TeaError(f"{place}: expected chosen and rejected to differ, got the same text; remove the row.")
    return prompt, chosen, rejected


def _pair_of_messages(
    prompt: Any, chosen: list[Any], rejected: list[Any], place: str
) -> tuple[list[Message], str, str]:
    good, bad = check_messages(chosen, place), check_messages(rejected, place)
    if len(good) == len(bad) == 1:
        if prompt is None:
            raise TeaError(f'{place}: expected a prompt, got answers alone; add a column "prompt".')
        shared = _as_messages(_prompt(prompt, place), place)
    else:
        # Whole conversations; a prompt beside them repeats what they begin with.
        shared = _common_prefix(good[:-1], bad[:-1])
        good, bad = good[len(shared) :], bad[len(shared) :]
        if not shared or shared[-1]["role"] == "assistant":
            raise TeaError(
                f"{place}: expected chosen and rejected to share all but their last turn, got other conversations; mend it."
            )
    return shared, _last_turn(good, "chosen", place), _last_turn(bad, "rejected", place)


def _common_prefix(one: Any, other: Any) -> Any:
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return one[:length]


def _prompt(value: Any, place: str) -> str | list[Message]:
    return "" if value == "" else check_prompt(value, place)


def _as_messages(prompt: str | list[Message], place: str) -> list[Message]:
    if prompt == "":
        raise TeaError(f"{place}: expected a prompt before an assistant's turn, got blank text; fill it.")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _last_turn(value: list[Any], name: str, place: str) -> str:
    messages = check_messages(value, place)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise TeaError(
            f'{place}: expected "{name}" as text or one assistant\'s turn, got {len(messages)} turn(s); earlier turns belong '
            "to the prompt."
        )
    return _text(messages[0]["content"], name, place)


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise TeaError(f'{place}: expected "{name}" as text, got {shown(value)}; fill or remove the row.')
    if not value.strip():
        raise TeaError(f'{place}: expected text as "{name}", got blank text; fill or remove the row.')
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise TeaError(
            f'{place}: expected text as "{name}", got half of a character (a lone surrogate); mend the row.'
        )
    return value


def shown(value: Any) -> str:
    """A value as an error shows it, with its type."""
    if value is None:
        return "nothing"
    return f"{type(value).__name__} {json.dumps(value, ensure_ascii=False, default=str):.50}"
