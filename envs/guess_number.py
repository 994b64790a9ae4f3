"""Guess a number from hints."""

from __future__ import annotations

import math
import re

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, tidy, whole_number
from tea_rl.errors import TeaError

#: More numbers than this are not listed as choices.
_MOST_CHOICES = 256


class GuessNumber(TextEnv):
    """Find a number with hints "Higher" and "Lower": reward 1 for finding it, else 0.

    The reward term ``progress`` is the share of the search that a guess saves, in bits: it sums to 1 over an episode
    that finds the number. An invalid answer costs a guess.

    Args:
        low: smallest number.
        high: largest number.
        max_guesses: guesses allowed; bisection needs at most ``ceil(log2(high - low + 2))``.
        show_range: repeat in every hint which numbers remain.

    Raises:
        TeaError: the range is empty, or a setting is no whole number.
    """

    reward_term_names = ("progress",)

    def __init__(
        self,
        low: int = 1,
        high: int = 32,
        max_guesses: int = 6,
        show_range: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.low = whole_number("low", low, 0)
        self.high = whole_number("high", high, 0)
        if self.low >= self.high:
            raise TeaError(f"low must be below high, got low {low} and high {high}")
        super().__init__(max_turns=whole_number("max_guesses", max_guesses, 1), render_mode=render_mode)
        self.show_range = show_range

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        self._target = int(rng.integers(self.low, self.high + 1))
        self._from, self._to = self.low, self.high
        tries = "1 try" if self.max_turns == 1 else f"{self.max_turns} tries"
        return f"Find my number from {self.low} to {self.high} in {tries}. Answer with one number.\nGuess:"

    def _act(self, text: str) -> Turn:
        guess = self._parse(text)
        if guess is None:
            reply = self._reply(f"Answer with one number from {self.low} to {self.high}.")
            return Turn(reply, invalid=True)
        before = self._to - self._from + 1
        if guess == self._target:
            self._from = self._to = guess
            return Turn("Correct.", 1.0, True, parsed=str(guess), terms={"progress": self._progress(before)})
        if guess < self._target:
            self._from = max(self._from, guess + 1)
        else:
            self._to = min(self._to, guess - 1)
        hint = "Higher." if guess < self._target else "Lower."
        if self.show_range:
            hint += f" It is from {self._from} to {self._to}."
        return Turn(self._reply(hint), parsed=str(guess), terms={"progress": self._progress(before)})

    def _parse(self, text: str) -> int | None:
        answer = tidy(text)
        # A sign or more digits than the largest number has cannot be right (and int() refuses thousands of digits).
        if not re.fullmatch(r"[0-9]+", answer) or len(answer) > len(str(self.high)):
            return None
        number = int(answer)
        return number if self.low <= number <= self.high else None

    def _reply(self, hint: str) -> str:
        return f"{hint} Guess:" if self.turns_left else f"{hint} Out of guesses, it was {self._target}."

    def _progress(self, before: int) -> float:
        after = self._to - self._from + 1
        return math.log(before / after) / math.log(self.high - self.low + 1)

    def _admissible(self) -> list[str] | None:
        if self.high - self.low >= _MOST_CHOICES:
            return None
        return [str(number) for number in range(self.low, self.high + 1)]

    def _expert(self) -> str:
        return str((self._from + self._to) // 2)

    def _answer(self) -> str:
        return str(self._target)
