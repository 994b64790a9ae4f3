"""What the text environments share: a ``gymnasium.Env`` that speaks and listens in text."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from tea_rl.envs.spaces import AnyText
from tea_rl.errors import TeaError, did_you_mean

#: First word of the seed of every start that was asked for by index, so that it differs from ``reset(seed=index)``.
_INDEX_STREAM = 0x7EA


@dataclass(frozen=True)
class Turn:
    """What one action led to.

    Attributes:
        text: the new user-turn text.
        reward: of this turn alone.
        terminated: the game is over.
        invalid: the action was not understood; the base class then never pays a positive reward.
        parsed: the action as understood.
        terms: named parts for :class:`tea_rl.envs.wrappers.RewardTerms`; not added to ``reward`` by themselves.
    """

    text: str
    reward: float = 0.0
    terminated: bool = False
    invalid: bool = False
    parsed: str | None = None
    terms: dict[str, float] = field(default_factory=dict)


class TextEnv(gymnasium.Env[str, str]):
    """Base of the text environments: an observation is the new user-turn text, an action the assistant's text.

    A subclass implements :meth:`_start` and :meth:`_act`, and may override :meth:`_admissible`, :meth:`_expert` and
    :meth:`_answer`. An action that is not understood gives ``Turn(..., invalid=True)``, never an exception.

    ``info`` always holds ``turn`` (actions so far), ``invalid`` and ``parsed`` (of the last action; ``parsed`` is None
    when there was none or it was not understood), and where the environment knows them ``admissible`` (every answer
    that is accepted now), ``expert`` (what a good player would answer now; both only while the episode runs),
    ``answer`` (the hidden solution) and ``reward_terms`` (named parts of the reward).

    Attributes:
        max_turns: an episode has at most this many actions.
        limit_terminates: running out of turns is part of the game (``terminated``), not a cut (``truncated``).
        reward_range: bounds of the reward of one turn.
        reward_term_names: the names in ``info["reward_terms"]``.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}
    limit_terminates: ClassVar[bool] = True
    reward_term_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        max_turns: int,
        reward_range: tuple[float, float] = (0.0, 1.0),
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(max_turns, int) or isinstance(max_turns, bool) or max_turns < 1:
            raise TeaError(f"max_turns must be a whole number of at least 1, got {max_turns!r}")
        self.max_turns = max_turns
        self.reward_range = reward_range
        self.render_mode = render_mode
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._turn = 0
        self._running = False
        self._text = ""

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        """Begin an episode and return its prompt.

        Args:
            rng: decides the start. Luck during the episode comes from ``self.np_random``.
            index: the start's number, where one was asked for; ``rng`` is then the same each time.
        """
        raise NotImplementedError

    def _act(self, text: str) -> Turn:
        """Take one action; ``self.turns_left`` already counts it."""
        raise NotImplementedError

    def _admissible(self) -> list[str] | None:
        return None

    def _expert(self) -> str | None:
        return None

    def _answer(self) -> str | None:
        return None

    @property
    def turns_left(self) -> int:
        """Actions that remain in this episode."""
        return self.max_turns - self._turn

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: of ``np_random``: the start when no index is given, and luck during the episode.
            options: ``{"index": i}`` gives start number ``i``, the same whatever the seed.

        Raises:
            TeaError: another option, or an index that is not a whole number of at least 0.
        """
        super().reset(seed=seed)
        index = start_index(options)
        rng = self.np_random if index is None else np.random.default_rng([_INDEX_STREAM, index])
        self._turn, self._running = 0, True
        self._text = self._start(rng, index)
        return self._text, self._info(None)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer with ``action`` and return ``(text, reward, terminated, truncated, info)``.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or none was started.
            TeaError: the action is not text.
        """
        if not isinstance(action, str):
            raise TeaError(f"an action of {type(self).__name__} is text, got {type(action).__name__}")
        if not self._running:
            raise ResetNeeded(f"the episode of {type(self).__name__} is over: call reset() first")
        self._turn += 1
        turn = self._act(action)
        reward = min(0.0, float(turn.reward)) if turn.invalid else float(turn.reward)
        at_limit = self.turns_left <= 0 and not turn.terminated
        terminated = turn.terminated or (at_limit and self.limit_terminates)
        truncated = at_limit and not self.limit_terminates
        self._running = not (terminated or truncated)
        self._text = turn.text
        return self._text, reward, terminated, truncated, self._info(turn)

    def render(self) -> str | None:  # type: ignore[override]
        """The last text, when ``render_mode`` is ``"ansi"``."""
        return self._text if self.render_mode == "ansi" else None

    def _info(self, turn: Turn | None) -> dict[str, Any]:
        info: dict[str, Any] = {
            "turn": self._turn,
            "invalid": bool(turn and turn.invalid),
            "parsed": turn.parsed if turn and not turn.invalid else None,
        }
        known: dict[str, Any] = {"answer": self._answer()}
        if self._running:
            known |= {"admissible": self._admissible(), "expert": self._expert()}
        if self.reward_term_names:
            terms = turn.terms if turn else {}
            known["reward_terms"] = {name: float(terms.get(name, 0.0)) for name in self.reward_term_names}
        return info | {key: value for key, value in known.items() if value is not None}


def start_index(options: dict[str, Any] | None) -> int | None:
    """The start that ``reset(options=...)`` asks for, or None.

    Raises:
        TeaError: another option, or an index that is not a whole number of at least 0.
    """
    for key in options or {}:
        if key != "index":
            raise TeaError(
                f'reset(options=...) takes {{"index": number}}, got "{key}".{did_you_mean(key, ["index"])}'
            )
    index = (options or {}).get("index")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
        raise TeaError(
            f'reset(options={{"index": ...}}) takes a whole number of at least 0, got {index!r:.60}'
        )
    return int(index)


def pick(rng: np.random.Generator, index: int | None, count: int) -> int:
    """One of ``count`` numbered starts: ``index`` itself (modulo ``count``), or a drawn one."""
    return index % count if index is not None else int(rng.integers(count))


def tidy(text: str) -> str:
    """A short answer without surrounding white space, case and one closing full stop.

    >>> tidy("  Left. ")
    'left'
    """
    return text.strip().removesuffix(".").rstrip().casefold()


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int within bounds.

    Raises:
        TeaError: otherwise, naming the setting.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        upper = f" and at most {high}" if high is not None else ""
        raise TeaError(f"{name} must be a whole number of at least {low}{upper}, got {value!r:.60}")
    return value


def finite(value: Any) -> float:
    """``value`` as a reward; whatever is no finite number is 0 (libraries put texts there after an invalid move)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def require(module: str, what: str) -> ModuleType:
    """Import an optional library.

    Raises:
        TeaError: it is missing; with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TeaError(
            f"{what} needs the package {module.partition('.')[0]} ({error}): pip install 'tea-rl[envs]'"
        ) from error
