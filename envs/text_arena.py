"""Single-player games of the library textarena."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, finite, require, whole_number
from tea_rl.errors import TeaError, did_you_mean

#: The longest move a game of this library takes; longer text is not handed to its regular expressions.
_LONGEST_MOVE = 200
_PLAYER = 0
#: The library draws from the global random numbers, and rollouts step environments in threads.
_ONE_AT_A_TIME = threading.Lock()


class TextArena(TextEnv):
    """A single-player game of textarena, with its own reward paid at the end.

    textarena finds a move in square brackets anywhere in a text. Here the move must be the whole answer, with or without
    brackets, so that an answer hidden in chatter pays nothing. An invalid move is never paid, though the library gives
    partial credit for some. The library draws from Python's global ``random``: it gets a stream of its own.

    Args:
        game: an id of textarena for one player, such as ``GuessTheNumber-v0-raw``.
        max_turns: moves before the episode is truncated.
        **kwargs: settings of the game.

    Raises:
        TeaError: the package is missing, the game is unknown, needs more players, a language model or data, or refuses
            its settings.
    """

    limit_terminates = False

    def __init__(
        self,
        game: str = "GuessTheNumber-v0-raw",
        max_turns: int = 30,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._arena = require("textarena", "tea_rl/TextArena-v0")
        registry = require("textarena.envs.registration", "tea_rl/TextArena-v0").ENV_REGISTRY
        if game not in registry:
            raise TeaError(f'textarena has no game "{game}".{did_you_mean(game, registry)}')
        self.game = game
        self._kwargs = kwargs
        self._stream = random.Random(0)
        self._inner = self._begin(0)  # a game that cannot be played is refused here
        super().__init__(
            max_turns=whole_number("max_turns", max_turns, 1),
            reward_range=(-1.0, 1.0),
            render_mode=render_mode,
        )

    def _begin(self, seed: int) -> Any:
        self._stream.seed(seed)
        try:
            with self._own_random():
                # A fresh one each time: reset() of the library's games leaves things behind.
                inner = self._arena.make(self.game, **self._kwargs)
                inner.reset(num_players=1, seed=seed)
        except (
            Exception
        ) as error:  # several players, missing word lists, missing API keys: all sorts of exceptions
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TeaError(
                f"textarena's {self.game} with {self._kwargs} cannot be played alone: {reason}"
            ) from error
        return inner

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        with _ONE_AT_A_TIME:
            outside = random.getstate()
            random.setstate(self._stream.getstate())
            try:
                yield
            finally:
                self._stream.setstate(random.getstate())
                random.setstate(outside)

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        self._inner = self._begin(int(rng.integers(2**31)))
        self._stream.seed(int(self.np_random.integers(2**31)))  # luck on the way is the episode's own
        return self._messages()

    def _act(self, text: str) -> Turn:
        move = text.strip().removesuffix(".")
        if move.startswith("[") and move.endswith("]"):
            move = move[1:-1]
        move = move.strip()
        if not move or len(move) > _LONGEST_MOVE or any(sign in move for sign in "[]\n\r"):
            return Turn("Answer with one move in square brackets.", invalid=True)
        state = self._inner.state
        mistakes = state.error_count
        try:
            with self._own_random():
                done, _ = self._inner.step(f"[{move}]")
                text = self._messages()
        except Exception as error:  # a move the game cannot digest
            return Turn(f"The game broke ({type(error).__name__}).", terminated=True, invalid=True)
        invalid = state.error_count > mistakes or bool(state.game_info[_PLAYER].get("invalid_move"))
        reward = 0.0
        if done:
            reward = min(1.0, max(-1.0, finite((state.rewards or {}).get(_PLAYER))))
            text = "\n".join(filter(None, [text, str(state.game_info[_PLAYER].get("reason") or "")]))
        return Turn(text, reward, bool(done), invalid, parsed=f"[{move}]")

    def _messages(self) -> str:
        _, news = self._inner.get_observation()
        if isinstance(news, str):
            return news.strip()
        return "\n".join(str(text).strip() for sender, text, *_ in news if sender != _PLAYER)

    def _admissible(self) -> list[str] | None:
        name = self.game.partition("-")[0]
        if name == "GuessTheNumber":
            low, high = self._inner.min_number, self._inner.max_number
            tried = self._inner.guessed_numbers
            return [f"[{number}]" for number in range(low, high + 1) if number not in tried]
        if name == "Bandit":
            return [f"[{button}]" for button in self._inner.buttons]
        return [f"[{move}]" for move in _MOVES[name]] if name in _MOVES else None

    def _expert(self) -> str | None:
        if not self.game.startswith("GuessTheNumber"):
            return None
        low, high = self._inner.min_number, self._inner.max_number
        for guess, hint in self._inner.state.game_state["guess_history"]:
            low, high = (max(low, guess + 1), high) if hint == "higher" else (low, min(high, guess - 1))
        return f"[{(low + high) // 2}]"


#: Games in which the same few moves are open at every turn.
_MOVES = {
    "FrozenLake": ("up", "down", "left", "right"),
    "Secretary": ("accept", "continue"),
    "Blackjack": ("Hit", "Stand"),
}
