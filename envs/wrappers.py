"""Wrappers for text environments, beside gymnasium's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import gymnasium
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import TimeLimit

from tea_rl.envs.base import start_index, whole_number
from tea_rl.errors import TeaError, did_you_mean

Step: TypeAlias = tuple[str, float, bool, bool, dict[str, Any]]
#: Called with (action, observation, reward, terminated, truncated, info); returns the term's value.
TermFunction: TypeAlias = Callable[[str, str, float, bool, bool, dict[str, Any]], float]
TextWrapper: TypeAlias = gymnasium.Wrapper[str, str, str, str]


class RewardTerms(TextWrapper, RecordConstructorArgs):
    """The reward as a weighted sum of named terms, each of which is logged in ``info["reward_terms"]``.

    Terms that always exist: ``env`` (the environment's own reward), ``invalid`` (1 for an action that was not
    understood) and ``step`` (1 each turn). Further ones come from the environment (its ``reward_term_names``) and from
    ``terms``. A term that is not weighted is logged and does not count.

    Args:
        env: the environment.
        weights: weight of each term, such as ``{"env": 1, "progress": 0.3, "invalid": -0.1}``.
        terms: functions of your own, by name.

    Raises:
        TeaError: a weight for a term that does not exist, or that is no number.
    """

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        weights: Mapping[str, float],
        terms: Mapping[str, TermFunction] | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, weights=weights, terms=terms)
        super().__init__(env)
        own = env.get_wrapper_attr("reward_term_names") if env.has_wrapper_attr("reward_term_names") else ()
        self.reward_term_names = tuple(dict.fromkeys(["env", "invalid", "step", *own, *(terms or {})]))
        for name, weight in weights.items():
            if name not in self.reward_term_names:
                raise TeaError(
                    f'there is no reward term "{name}".{did_you_mean(name, self.reward_term_names)} '
                    f"Terms here: {', '.join(self.reward_term_names)}."
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise TeaError(f'the weight of the reward term "{name}" must be a number, got {weight!r:.60}')
        self._weights = dict(weights)
        self._functions = dict(terms or {})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode; every term is 0."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, info | {"reward_terms": dict.fromkeys(self.reward_term_names, 0.0)}

    def step(self, action: str) -> Step:
        """Step, and replace the reward by the weighted sum."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = float(reward)
        values = {
            "env": reward,
            "invalid": float(bool(info.get("invalid"))),
            "step": 1.0,
            **info.get("reward_terms", {}),
        }
        for name, function in self._functions.items():
            values[name] = float(function(action, observation, reward, terminated, truncated, info))
        total = sum(weight * values.get(name, 0.0) for name, weight in self._weights.items())
        return observation, total, terminated, truncated, info | {"reward_terms": values}

    @property
    def reward_range(self) -> tuple[float, float]:
        """Unknown: a weighted sum of terms without bounds."""
        return (float("-inf"), float("inf"))


class StepPenalty(gymnasium.RewardWrapper[str, str], RecordConstructorArgs):
    """Every turn costs ``penalty``, so that the shorter of two ways is worth more.

    Raises:
        TeaError: the penalty is negative.
    """

    def __init__(self, env: gymnasium.Env[str, str], penalty: float) -> None:
        RecordConstructorArgs.__init__(self, penalty=penalty)
        super().__init__(env)
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not penalty >= 0:
            raise TeaError(f"the step penalty must be a number of at least 0, got {penalty!r:.60}")
        self.penalty = float(penalty)

    def reward(self, reward: Any) -> float:
        """The reward less the penalty."""
        return float(reward) - self.penalty

    @property
    def reward_range(self) -> tuple[float, float]:
        """The environment's own bounds, moved down."""
        low, high = reward_range(self.env)
        return low - self.penalty, high - self.penalty


class ParseAction(gymnasium.ActionWrapper[str, str, str], RecordConstructorArgs):  # type: ignore[misc]
    """Take the action out of a longer text.

    Args:
        env: the environment.
        pattern: ``first_line`` (the first line that is not empty), ``last_line``, or a regular expression whose first
            match is taken (its first group, when it has one). A text without a match is an empty action, which no
            environment here accepts.

    Raises:
        TeaError: the pattern is not a regular expression.
    """

    def __init__(self, env: gymnasium.Env[str, str], pattern: str = "first_line") -> None:
        RecordConstructorArgs.__init__(self, pattern=pattern)
        super().__init__(env)
        self.pattern = pattern
        try:
            self._regex = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise TeaError(
                f"the pattern must be first_line, last_line or a regular expression, got {pattern!r:.80} ({error})"
            ) from error

    def action(self, action: str) -> str:
        """What the environment is given."""
        if self.pattern in ("first_line", "last_line"):
            lines = [line.strip() for line in action.splitlines() if line.strip()] or [""]
            return lines[0 if self.pattern == "first_line" else -1]
        match = self._regex.search(action)
        if match is None:
            return ""
        return (match.group(1) if self._regex.groups else match.group()) or ""


class AdmissibleActions(TextWrapper, RecordConstructorArgs):
    """The policy scores the answers in ``info["admissible"]`` instead of writing free text.

    A recipe that names this wrapper scores them, as with ``env.choose_admissible``. Any other answer reaches the
    environment as an empty one, which it calls invalid.

    Args:
        env: an environment that lists what it accepts.
        choices: the answers, for an environment that does not.

    Raises:
        TeaError: at the first reset or step that lists nothing.
    """

    def __init__(self, env: gymnasium.Env[str, str], choices: Sequence[str] | None = None) -> None:
        RecordConstructorArgs.__init__(self, choices=choices)
        super().__init__(env)
        if choices is not None and (
            isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices)
        ):
            raise TeaError(f"choices must be a list of one or more texts, got {choices!r:.80}")
        self._choices = choices
        self._open: list[str] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode; ``info["admissible"]`` is there."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._listed(info)

    def step(self, action: str) -> Step:
        """Step with one of the choices."""
        taken = action if action in self._open else ""
        observation, reward, terminated, truncated, info = self.env.step(taken)
        if not (terminated or truncated):
            info = self._listed(info)
        return observation, float(reward), terminated, truncated, info

    def _listed(self, info: dict[str, Any]) -> dict[str, Any]:
        choices = self._choices if self._choices is not None else info.get("admissible")
        if not choices:
            name = self.spec.id if self.spec else type(self.unwrapped).__name__
            raise TeaError(
                f"{name} does not list what it accepts: give choices=[...] or let the policy write freely"
            )
        self._open = list(choices)
        return info | {"admissible": list(choices)}


class WorkedExamples(TextWrapper, RecordConstructorArgs):
    """Puts whole episodes of the environment's expert in front of the first prompt, as a plain transcript.

    A small model that was never told the form of an answer rarely finds it by itself, and then no reward ever comes. The
    examples are the same in every episode.

    Args:
        env: an environment with an expert.
        count: episodes to show.
        first: index of the first start that is shown; it should not be one that is trained or measured on.

    Raises:
        TeaError: the environment has no expert, or ``count`` is below 1.
    """

    def __init__(self, env: gymnasium.Env[str, str], count: int = 1, first: int = 2_000_003) -> None:
        RecordConstructorArgs.__init__(self, count=count, first=first)
        super().__init__(env)
        whole_number("count", count, 1)
        self.examples = "\n\n".join(self._example(whole_number("first", first, 0) + n) for n in range(count))
        # The examples were seeded; the first reset without a seed must not be.
        self.unwrapped._np_random = None

    def _example(self, index: int) -> str:
        text, info = self.env.reset(seed=index, options={"index": index})
        told, done = [text], False
        while not done:
            answer = info.get("expert")
            if answer is None:
                raise TeaError(f"{type(self.unwrapped).__name__} has no expert whose examples could be shown")
            text, _, terminated, truncated, info = self.env.step(answer)
            told.append(f" {answer}\n{text}")
            done = terminated or truncated
        return "".join(told)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode; its prompt follows the examples."""
        text, info = self.env.reset(seed=seed, options=options)
        return f"{self.examples}\n\n{text}", info


class CompleteInfo(TextWrapper, RecordConstructorArgs):
    """Gives an environment from elsewhere what ours have: ``turn``, ``invalid``, ``parsed``, and starts by index.

    Start ``i`` is the environment's ``reset(seed=i)``; other options are passed on.
    """

    def __init__(self, env: gymnasium.Env[str, str]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._turn = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode."""
        options = dict(options or {})
        index = start_index({"index": options.pop("index", None)})
        self._turn = 0
        observation, info = self.env.reset(seed=seed if index is None else index, options=options or None)
        return observation, {"turn": 0, "invalid": False, "parsed": None} | info

    def step(self, action: str) -> Step:
        """Step; an action counts as understood unless the environment says otherwise."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._turn += 1
        filled = {"turn": self._turn, "invalid": False, "parsed": action} | info
        return observation, float(reward), terminated, truncated, filled


#: The wrappers a recipe or a command names.
WRAPPERS: dict[str, Callable[..., gymnasium.Env[str, str]]] = {
    "reward_terms": RewardTerms,
    "step_penalty": StepPenalty,
    "parse_action": ParseAction,
    "admissible_actions": AdmissibleActions,
    "time_limit": TimeLimit,
    "worked_examples": WorkedExamples,
}


def wrap(env: gymnasium.Env[str, str], name: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    """Put a wrapper of :data:`WRAPPERS` around ``env``.

    Raises:
        TeaError: unknown wrapper, or settings it refuses.
    """
    if name not in WRAPPERS:
        raise TeaError(
            f'there is no wrapper "{name}".{did_you_mean(name, WRAPPERS)} It has: {", ".join(WRAPPERS)}.'
        )
    try:
        return WRAPPERS[name](env, **kwargs)
    except (TypeError, ValueError) as error:
        raise TeaError(f"the wrapper {name} refuses the settings {kwargs}: {error}") from error


def reward_range(env: gymnasium.Env[Any, Any]) -> tuple[float, float]:
    """Declared bounds of the reward of one turn; without limits where none are declared."""
    if env.has_wrapper_attr("reward_range"):
        low, high = env.get_wrapper_attr("reward_range")
        return float(low), float(high)
    return (float("-inf"), float("inf"))
