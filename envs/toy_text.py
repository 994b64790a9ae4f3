"""Gymnasium's toy-text games, told in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs import toy_text

from tea_rl.envs.base import TextEnv, Turn, tidy, whole_number
from tea_rl.errors import TeaError, did_you_mean


@dataclass(frozen=True)
class _Game:
    """How one game is told: ``name`` is its class in gymnasium; ``moves`` are in the order of the game's own action numbers."""

    name: str
    moves: tuple[str, ...]
    max_turns: int
    rules: Callable[[Any], str]
    describe: Callable[[Any, Any], str]
    ending: Callable[[float], str]
    #: Reward of an answer that is no move: never better than playing on.
    invalid_reward: float = 0.0
    invalid_ends: bool = False
    #: Where the game has no transition table to read the bounds from.
    reward_range: tuple[float, float] = (0.0, 0.0)


class ToyText(TextEnv):
    """FrozenLake, Taxi, CliffWalking and Blackjack of gymnasium, with gymnasium's own rewards.

    An answer that is no move changes nothing and costs what a step costs (Taxi, CliffWalking: -1); in Blackjack it
    forfeits the game (-1), for not playing would be better than playing. The expert of the three mazes follows the
    optimal policy (value iteration, discount 0.99), that of Blackjack the basic strategy for hit and stick.

    Args:
        game: ``frozen_lake``, ``taxi``, ``cliff_walking`` or ``blackjack``.
        max_turns: moves before the episode is truncated; None for the game's own default.
        map_name: FrozenLake only: ``4x4``, ``8x8``, or ``random`` for a new map at every start.
        size: FrozenLake only: side of a random map (2 to 16).
        **kwargs: settings of the gymnasium environment, such as ``is_slippery``.

    Raises:
        TeaError: unknown game or setting.
    """

    limit_terminates: ClassVar[bool] = False

    def __init__(
        self,
        game: str,
        max_turns: int | None = None,
        size: int = 4,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        if game not in _GAMES:
            raise TeaError(
                f'there is no toy-text game "{game}".{did_you_mean(game, _GAMES)} Choose {", ".join(_GAMES)}.'
            )
        self.game = _GAMES[game]
        self._size = whole_number("size", size, 2, 16)
        self._random_map = game == "frozen_lake" and kwargs.get("map_name") == "random"
        if self._random_map:
            del kwargs["map_name"]
        self._kwargs = kwargs
        self._inner = self._make()
        self._policy: np.ndarray | None = None
        super().__init__(
            max_turns=self.game.max_turns if max_turns is None else max_turns,
            reward_range=self._range(),
            render_mode=render_mode,
        )

    def _make(self, **more: Any) -> Any:
        try:
            return getattr(toy_text, self.game.name)(**self._kwargs, **more)
        except (TypeError, KeyError, ValueError, AssertionError, gymnasium.error.Error) as error:
            raise TeaError(f"{self.game.name} refuses the settings {self._kwargs}: {error}") from error

    def _range(self) -> tuple[float, float]:
        if not hasattr(self._inner, "P"):
            return self.game.reward_range
        moves = [move for state in self._inner.P.values() for move in state.values()]
        rewards = [float(outcome[2]) for move in moves for outcome in move]
        return min(rewards + [self.game.invalid_reward]), max(rewards)

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        if self._random_map:
            from gymnasium.envs.toy_text.frozen_lake import generate_random_map

            self._inner = self._make(desc=generate_random_map(self._size, seed=int(rng.integers(2**31))))
            self._policy = None
        self._state, _ = self._inner.reset(seed=int(rng.integers(2**31)))
        self._inner.np_random = self.np_random  # the start is drawn; luck on the way is the episode's own
        return f"{self.game.rules(self._inner)}\n{self._describe()}"

    def _act(self, text: str) -> Turn:
        move = tidy(text)
        if move not in self.game.moves:
            if self.game.invalid_ends:
                return Turn("Not a move. You lose.", self.game.invalid_reward, True, invalid=True)
            return Turn(
                f"Answer {_either(self.game.moves)}. {self._describe()}",
                self.game.invalid_reward,
                invalid=True,
            )
        self._state, reward, terminated, _, _ = self._inner.step(self.game.moves.index(move))
        text = self.game.ending(float(reward)) if terminated else self._describe()
        return Turn(text, float(reward), bool(terminated), parsed=move)

    def _describe(self) -> str:
        return f"{self.game.describe(self._inner, self._state)} Move:"

    def _admissible(self) -> list[str]:
        return list(self.game.moves)

    def _expert(self) -> str:
        if self.game.name == "BlackjackEnv":
            return "hit" if _should_hit(*self._state) else "stick"
        if self._policy is None:
            self._policy = optimal_policy(self._inner.P)
        return self.game.moves[int(self._policy[self._state])]


def optimal_policy(transitions: dict[int, dict[int, list[tuple]]], discount: float = 0.99) -> np.ndarray:
    """Best action in every state of a gymnasium transition table, by value iteration.

    Args:
        transitions: ``P[state][action] = [(probability, next state, reward, terminated), ...]``.
        discount: below 1, so that the shorter of two ways is better.

    Shape: ``(number of states,)``, integers.
    """
    states, actions = len(transitions), len(transitions[0])
    rows = [
        (state, action, *outcome)
        for state in range(states)
        for action in range(actions)
        for outcome in transitions[state][action]
    ]
    table = np.array([[float(value) for value in row] for row in rows])
    where = table[:, 0].astype(int) * actions + table[:, 1].astype(int)
    probability, reward, alive = table[:, 2], table[:, 4], 1.0 - table[:, 5]
    following = table[:, 3].astype(int)
    values = np.zeros(states)
    while True:
        returns = probability * (reward + discount * alive * values[following])
        action_values = np.bincount(where, returns, states * actions).reshape(states, actions)
        best = action_values.max(axis=1)
        if np.abs(best - values).max() < 1e-9:
            # Rounding keeps equal ways equal, so that the first of them is taken on every machine.
            return np.round(action_values, 6).argmax(axis=1)
        values = best


def _should_hit(total: int, dealer: int, usable_ace: int) -> bool:
    """Basic strategy restricted to hit and stick; ``dealer`` is 1 for an ace."""
    if usable_ace:
        return total <= 17 or (total == 18 and dealer in (1, 9, 10))
    if total <= 11 or (total == 12 and dealer in (2, 3)):
        return True
    return total <= 16 and dealer in (1, 7, 8, 9, 10)


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _place(row: int, column: int) -> str:
    return f"row {row + 1}, column {column + 1}"


def _lake_rules(env: Any) -> str:
    rows = "\n".join("".join(cell.decode() for cell in row) for row in env.desc)
    return f"Walk from S to G over ice F. H is a hole. Answer {_either(_LAKE_MOVES)}.\n{rows}"


def _cliff_rules(env: Any) -> str:
    grid = np.where(env._cliff, "C", ".")
    grid[3, 0], grid[3, 11] = "S", "G"
    rows = "\n".join("".join(row) for row in grid)
    return f"Walk from S to G. The cliff C throws you back to S. Answer {_either(_CLIFF_MOVES)}.\n{rows}"


def _taxi_rules(env: Any) -> str:
    rows = "\n".join("".join(cell.decode() for cell in row) for row in env.desc)
    return (
        f"Drive the taxi to the passenger, pick up, drive to the goal, drop off. | is a wall. "
        f"Answer {_either(_TAXI_MOVES)}.\n{rows}"
    )


def _taxi_state(env: Any, state: int) -> str:
    row, column, passenger, goal = env.decode(state)
    where = "in the taxi" if passenger == 4 else f"at {_place(*env.locs[passenger])}"
    return f"Taxi at {_place(row, column)}. Passenger {where}. Goal at {_place(*env.locs[goal])}."


def _hand(env: Any, state: tuple[int, int, int]) -> str:
    total, dealer, usable_ace = state
    ace = " with an ace as 11" if usable_ace else ""
    return f"You have {total}{ace}. The dealer shows {'an ace' if dealer == 1 else dealer}."


def _lake_state(env: Any, state: int) -> str:
    return f"You are at {_place(*divmod(int(state), env.ncol))}."


def _cliff_state(env: Any, state: int) -> str:
    return f"You are at {_place(*divmod(int(state), env.shape[1]))}."


_LAKE_MOVES = ("left", "down", "right", "up")
_CLIFF_MOVES = ("up", "right", "down", "left")
_TAXI_MOVES = ("south", "north", "east", "west", "pickup", "dropoff")
_GAMES = {
    "frozen_lake": _Game(
        "FrozenLakeEnv",
        _LAKE_MOVES,
        20,
        _lake_rules,
        _lake_state,
        lambda reward: "You reached the goal." if reward > 0 else "You fell into a hole.",
    ),
    "taxi": _Game(
        "TaxiEnv",
        _TAXI_MOVES,
        30,
        _taxi_rules,
        _taxi_state,
        lambda reward: "The passenger has arrived.",
        invalid_reward=-1.0,
    ),
    "cliff_walking": _Game(
        "CliffWalkingEnv",
        _CLIFF_MOVES,
        30,
        _cliff_rules,
        _cliff_state,
        lambda reward: "You reached the goal.",
        invalid_reward=-1.0,
    ),
    "blackjack": _Game(
        "BlackjackEnv",
        ("stick", "hit"),
        12,
        lambda env: "Blackjack: come closer to 21 than the dealer, not above. Answer stick or hit.",
        _hand,
        lambda reward: "You win." if reward > 0 else "You lose." if reward < 0 else "A draw.",
        invalid_reward=-1.0,
        invalid_ends=True,
        reward_range=(-1.0, 1.5),
    ),
}
