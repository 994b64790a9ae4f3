"""Slot machines whose winnings are paid at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, tidy, whole_number
from tea_rl.errors import TeaError

#: Invalid answers an episode survives.
_SPARE_TURNS = 3


class Bandit(TextEnv):
    """Find the machine that wins most often; all winnings are paid with the last pull (delayed reward).

    The reward is the share of winning pulls, in [0, 1], 0 until the last pull. An invalid answer pulls nothing; after
    three of them the next one ends the episode without pay. The expert pulls the machine with the highest posterior mean
    (uniform prior).

    Args:
        pulls: valid pulls in an episode.
        probabilities: how often each machine wins; which machine has which is drawn at the start.

    Raises:
        TeaError: fewer than 2 or more than 26 machines, or a probability outside of [0, 1].
    """

    def __init__(
        self,
        pulls: int = 8,
        probabilities: Sequence[float] = (0.9, 0.2, 0.2),
        render_mode: str | None = None,
    ) -> None:
        self.pulls = whole_number("pulls", pulls, 1)
        self.probabilities = _checked(probabilities)
        self.machines = [chr(ord("A") + number) for number in range(len(self.probabilities))]
        super().__init__(max_turns=pulls + _SPARE_TURNS, render_mode=render_mode)

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        self._chances = rng.permutation(self.probabilities)
        self._pulled = np.zeros(len(self.machines), dtype=int)
        self._won = np.zeros(len(self.machines), dtype=int)
        names = f"{', '.join(self.machines[:-1])} or {self.machines[-1]}"
        return (
            f"Each machine wins with its own chance. Win as often as you can in {self.pulls} pulls. "
            f"Answer {names}.\nPull:"
        )

    def _act(self, text: str) -> Turn:
        name = tidy(text).upper()
        if name not in self.machines:
            if not self.turns_left:
                return Turn("Too many invalid answers.", invalid=True, terminated=True)
            return Turn(f"Answer one of {', '.join(self.machines)}. Pull:", invalid=True)
        machine = self.machines.index(name)
        won = bool(self.np_random.random() < self._chances[machine])
        self._pulled[machine] += 1
        self._won[machine] += won
        said = "Win." if won else "Lose."
        if self._pulled.sum() < self.pulls:
            return Turn(f"{said} Pull:", parsed=name)
        total = int(self._won.sum())
        return Turn(f"{said} You won {total} of {self.pulls}.", total / self.pulls, True, parsed=name)

    def _admissible(self) -> list[str]:
        return list(self.machines)

    def _expert(self) -> str:
        return self.machines[int(np.argmax((self._won + 1) / (self._pulled + 2)))]

    def _answer(self) -> str:
        return self.machines[int(np.argmax(self._chances))]


def _checked(probabilities: Sequence[float]) -> list[float]:
    wanted = "probabilities must be 2 to 26 numbers from 0 to 1"
    try:
        numbers = [float(value) for value in probabilities]
    except (TypeError, ValueError) as error:
        raise TeaError(f"{wanted}, got {probabilities!r:.60}") from error
    if not 2 <= len(numbers) <= 26 or not all(0.0 <= number <= 1.0 for number in numbers):
        raise TeaError(f"{wanted}, got {probabilities!r:.60}")
    return numbers
