"""Find a fact in the prompt."""

from __future__ import annotations

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, tidy, whole_number

_NAMES = (
    "Anna", "Ben", "Carl", "Dora", "Emma", "Fred", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mary", "Nick",
    "Olga", "Paul",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "pink", "brown", "orange", "purple")


class Retrieval(TextEnv):
    """One question about one of the facts in the prompt: reward 1 for the right colour, else 0.

    Args:
        num_facts: facts in the prompt, each with a name and a colour of its own (1 to 10).

    Raises:
        TeaError: ``num_facts`` is out of bounds.
    """

    def __init__(self, num_facts: int = 5, render_mode: str | None = None) -> None:
        self.num_facts = whole_number("num_facts", num_facts, 1, len(_COLOURS))
        super().__init__(max_turns=1, render_mode=render_mode)

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        names = rng.choice(_NAMES, self.num_facts, replace=False)
        colours = rng.choice(_COLOURS, self.num_facts, replace=False)
        asked = int(rng.integers(self.num_facts))
        self._colour = str(colours[asked])
        facts = " ".join(f"{name}'s hat is {colour}." for name, colour in zip(names, colours, strict=True))
        return f"{facts}\nWhich colour is {names[asked]}'s hat? Answer with one word.\nColour:"

    def _act(self, text: str) -> Turn:
        colour = tidy(text)
        if colour not in _COLOURS:
            return Turn(f"Not a colour. It was {self._colour}.", terminated=True, invalid=True)
        if colour == self._colour:
            return Turn("Correct.", 1.0, True, parsed=colour)
        return Turn(f"Wrong, it was {self._colour}.", terminated=True, parsed=colour)

    def _admissible(self) -> list[str]:
        return list(_COLOURS)

    def _expert(self) -> str:
        return self._colour

    def _answer(self) -> str:
        return self._colour
