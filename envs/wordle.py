"""Guess a word from marks under its letters."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, tidy, whole_number
from tea_rl.envs.words import word_lengths, words_of
from tea_rl.errors import TeaError

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")


class Wordle(TextEnv):
    """Find a secret word: reward 1 for finding it, else 0.

    Every letter of a guess comes back with a mark: ``+`` right place, ``?`` another place, ``-`` not in the word (a
    letter is marked as often as the word holds it). Any row of ``length`` letters a to z is a valid guess;
    ``info["admissible"]`` lists the words that can be secret. An invalid answer costs a guess. The expert answers with
    the first listed word that fits all marks.

    Args:
        length: letters of the word (3 to 6).
        max_guesses: guesses allowed.
        num_words: use only this many words, evenly spread over the list; None for all.

    Raises:
        TeaError: there are no words of this length, or fewer than asked for.
    """

    def __init__(
        self,
        length: int = 5,
        max_guesses: int = 6,
        num_words: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        words = words_of(length)
        if not words:
            raise TeaError(f"length must be one of {', '.join(map(str, word_lengths()))}, got {length!r}")
        if num_words is not None:
            whole_number("num_words", num_words, 1, len(words))
            words = [words[number * len(words) // num_words] for number in range(num_words)]
        self.words = words
        self.length = length
        super().__init__(max_turns=whole_number("max_guesses", max_guesses, 1), render_mode=render_mode)

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        self._secret = str(rng.choice(self.words))
        self._possible = list(self.words)
        tries = "1 try" if self.max_turns == 1 else f"{self.max_turns} tries"
        return (
            f"Find my word of {self.length} letters in {tries}. Marks: + right place, ? other place, - not in the word. "
            "Answer with one word.\nGuess:"
        )

    def _act(self, text: str) -> Turn:
        guess = tidy(text)
        if len(guess) != self.length or not _LETTERS.issuperset(guess):
            return Turn(self._reply(f"Answer with {self.length} letters."), invalid=True)
        if guess == self._secret:
            return Turn("Correct.", 1.0, True, parsed=guess)
        seen = marks(guess, self._secret)
        self._possible = [word for word in self._possible if marks(guess, word) == seen]
        letters = " ".join(letter + mark for letter, mark in zip(guess, seen, strict=True))
        return Turn(self._reply(letters), parsed=guess)

    def _reply(self, said: str) -> str:
        return f"{said}\nGuess:" if self.turns_left else f"{said}\nOut of guesses, it was {self._secret}."

    def _admissible(self) -> list[str]:
        return list(self.words)

    def _expert(self) -> str:
        return self._possible[0]

    def _answer(self) -> str:
        return self._secret


def marks(guess: str, secret: str) -> str:
    """One mark per letter of ``guess``.

    >>> marks("llama", "lemon")
    '+--?-'
    """
    found = ["+" if a == b else "-" for a, b in zip(guess, secret, strict=True)]
    spare = Counter(b for a, b in zip(guess, secret, strict=True) if a != b)
    for place, letter in enumerate(guess):
        if found[place] == "-" and spare[letter]:
            found[place] = "?"
            spare[letter] -= 1
    return "".join(found)
