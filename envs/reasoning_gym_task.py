"""Questions of the library reasoning-gym as environments of one turn."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, finite, pick, require, whole_number
from tea_rl.errors import TeaError, did_you_mean

#: Scores below this are partial credit, such as for an answer that stands somewhere in a longer text.
_FULL_SCORE = 0.999
#: A scorer that gives full marks to one of these (``{}`` is the solution) reads right answers into wrong ones, as do
#: those of some fifteen of its hundred generators.
_PROBES = (
    "", "?", "tea-rl probe, no answer", "not {}", "maybe {} or something else", "{} is it", "first\n{}",
    "{}\nand more", "{}, nothing",
)  # fmt: skip
_NUMBER_PROBES = ("1000{}", "1e9", "-77{}")
_WORD_PROBES = ("x{}", "1000{}")
#: Words that hedge an answer, or that a scorer which evaluates formulas takes for Python's; and a way into Python itself.
_HEDGES = re.compile(r"\b(?:or|and|not|if|else|for|in|is|lambda)\b|__")
_NO_ANSWER = frozenset({"nan", "inf", "-inf", "infinity", "-infinity"})
#: Scorers parse, some slowly: what is longer than the solution times this, and than a short line, is not read.
_LONGEST_ANSWER = 4
_SHORT_LINE = 200


class ReasoningGym(TextEnv):
    """A question of a ``reasoning_gym`` generator: reward 1 for a fully right answer, else 0.

    The library's own scorer decides (a question may have several right answers), but only full marks count. Where it
    also gives them to the solution hidden in other text, the answer must be the generator's own. The answer is the
    whole action without surrounding white space; to read only its first line, wrap in ``ParseAction("first_line")``.

    ``options={"index": i}`` is question ``i`` modulo ``size``; another ``seed`` gives other questions.

    Args:
        dataset: name of the generator, such as ``chain_sum``.
        size: how many questions there are.
        seed: of the generator.
        **config: the generator's own settings.

    Raises:
        TeaError: the package is missing, or the generator or a setting is unknown or refused.
    """

    def __init__(
        self,
        dataset: str = "chain_sum",
        size: int = 1000,
        seed: int = 0,
        render_mode: str | None = None,
        **config: Any,
    ) -> None:
        self.size = whole_number("size", size, 1)
        self._data = _create(dataset, size, whole_number("seed", seed, 0), config)
        self._entries: dict[int, tuple[dict[str, Any], bool]] = {}
        super().__init__(max_turns=1, render_mode=render_mode)

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        number = pick(rng, index, self.size)
        if number not in self._entries:  # some puzzles take a second to make
            self._entry = self._data[number]
            self._entries[number] = self._entry, self._is_gullible()
        self._entry, self._exact = self._entries[number]
        return str(self._entry["question"]).strip()

    def _act(self, text: str) -> Turn:
        answer, solution = text.strip(), self._answer()
        shown = "" if solution is None else f" It was: {solution}"
        if answer != solution and not self._readable(answer):
            return Turn(f"No answer.{shown}", terminated=True, invalid=True)
        right = answer == solution or (not self._exact and self._score(answer) >= _FULL_SCORE)
        return Turn("Correct." if right else f"Wrong.{shown}", float(right), True, parsed=answer)

    def _readable(self, answer: str) -> bool:
        solution = self._answer() or ""
        if not 0 < len(answer) <= max(_SHORT_LINE, _LONGEST_ANSWER * len(solution)):
            return False
        if set(_HEDGES.findall(answer.casefold())) - set(_HEDGES.findall(solution.casefold())):
            return False
        printable = all(letter in "\n\t" or unicodedata.category(letter)[0] != "C" for letter in answer)
        return printable and answer.casefold() not in _NO_ANSWER

    def _is_gullible(self) -> bool:
        solution = self._answer() or ""
        # What is wrong before or after a number or a word may be right in a formula: -5x and x - 5x.
        more = _NUMBER_PROBES if _is_number(solution) else _WORD_PROBES if solution[:1].isalpha() else ()
        probes = [*_PROBES, *more]
        return any(self._score(probe.replace("{}", solution)) >= _FULL_SCORE for probe in probes)

    def _score(self, answer: str) -> float:
        try:
            return finite(self._data.score_answer(answer, self._entry))
        except Exception:  # several scorers raise what they like on text they cannot read
            return 0.0

    def _expert(self) -> str | None:
        return self._answer()

    def _answer(self) -> str | None:
        # A few generators only score: they know no solution, or an empty one.
        solution = self._entry["answer"]
        return str(solution).strip() or None if solution is not None else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _create(name: str, size: int, seed: int, config: Mapping[str, Any]) -> Any:
    gym = require("reasoning_gym", "tea_rl/ReasoningGym-v0")
    known = require("reasoning_gym.factory", "tea_rl/ReasoningGym-v0").DATASETS
    if name not in known:
        raise TeaError(
            f'reasoning_gym has no generator "{name}".{did_you_mean(name, known)} Choose one of its {len(known)}, '
            "such as chain_sum."
        )
    settings = [entry.name for entry in fields(known[name][1])]
    for key in config:
        if key not in settings:
            hint = did_you_mean(key, settings) or f" It has: {', '.join(settings)}."
            raise TeaError(f'reasoning_gym/{name} has no setting "{key}".{hint}')
    try:
        return gym.create_dataset(name, size=size, seed=seed, **config)
    except Exception as error:  # generators check their settings with assert, or not at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TeaError(
            f"reasoning_gym/{name} refuses these settings: {reason}; got {dict(config)}"
        ) from error
