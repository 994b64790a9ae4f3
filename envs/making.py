"""Which environments there are, and making one by its id."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium import spaces

from tea_rl.envs.base import TextEnv
from tea_rl.envs.wrappers import CompleteInfo, wrap
from tea_rl.errors import TeaError, did_you_mean

NAMESPACE = "tea_rl"


@dataclass(frozen=True)
class EnvEntry:
    """One registered environment of this package.

    Attributes:
        id: what gymnasium calls it.
        entry_point: module and class.
        summary: one line for a list.
        kwargs: default settings.
        package: the optional library it needs.
    """

    id: str
    entry_point: str
    summary: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    package: str | None = None

    @property
    def available(self) -> bool:
        """Whether the library it needs is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _entry(name: str, place: str, summary: str, package: str | None = None, **kwargs: Any) -> EnvEntry:
    return EnvEntry(f"{NAMESPACE}/{name}-v0", f"tea_rl.envs.{place}", summary, kwargs, package)


_TOY = "toy_text:ToyText"
ENVIRONMENTS = (
    _entry("GuessNumber", "guess_number:GuessNumber", "Find a number with the hints higher and lower."),
    _entry("Wordle", "wordle:Wordle", "Find a word from marks on its letters."),
    _entry("Bandit", "bandit:Bandit", "Find the best slot machine; paid at the end."),
    _entry("Retrieval", "retrieval:Retrieval", "Find one fact in the prompt."),
    _entry(
        "FrozenLake", _TOY, "Cross a frozen lake without falling in.", game="frozen_lake", is_slippery=False
    ),
    _entry("Taxi", _TOY, "Fetch a passenger and bring them to the goal.", game="taxi"),
    _entry("CliffWalking", _TOY, "Walk along a cliff to the goal.", game="cliff_walking"),
    _entry("Blackjack", _TOY, "Hit or stick against the dealer.", game="blackjack"),
    _entry("ReasoningGym", "reasoning_gym_task:ReasoningGym", "Questions of reasoning-gym.", "reasoning_gym"),
    _entry("TextArena", "text_arena:TextArena", "Single-player games of textarena.", "textarena"),
    _entry("TextWorld", "text_world:TextWorld", "Tiny text adventures of textworld.", "textworld"),
)


def register_all() -> None:
    """Register :data:`ENVIRONMENTS` with gymnasium, once."""
    for entry in ENVIRONMENTS:
        if entry.id not in gymnasium.registry:
            gymnasium.register(
                id=entry.id,
                entry_point=entry.entry_point,
                kwargs=dict(entry.kwargs),
                # The passive checker would compare every text of every step; tea-rl envs ID checks on request.
                disable_env_checker=True,
            )


def list_envs() -> list[EnvEntry]:
    """The environments of this package, in the order of the documentation."""
    return list(ENVIRONMENTS)


def make_env(
    id: str,
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Iterable[Mapping[str, Any]] = (),
) -> gymnasium.Env[str, str]:
    """Make any gymnasium environment that observes and acts in text.

    Args:
        id: a registered id; ``module:Name-v0`` imports the module first.
        kwargs: settings of the environment.
        wrappers: ``{"name": "step_penalty", "kwargs": {"penalty": 0.01}}``, innermost first.

    Raises:
        TeaError: unknown id, settings it refuses, or spaces that are not text.

    >>> env = make_env("tea_rl/GuessNumber-v0", {"high": 8})
    >>> print(env.reset(options={"index": 0})[0])
    Find my number from 1 to 8 in 6 tries. Answer with one number.
    Guess:
    """
    kwargs = dict(kwargs or {})
    spec = _spec(id)
    _refuse_unknown(spec, kwargs)
    try:
        env = gymnasium.make(spec, **kwargs)
    except TeaError:
        raise
    except Exception as error:  # an environment from elsewhere may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TeaError(f"{id} could not be made with {kwargs}: {reason}") from error
    for name in ("observation_space", "action_space"):
        space = getattr(env, name)
        if not isinstance(space, spaces.Text):
            env.close()
            raise TeaError(
                f"{id} is not a text environment: its {name} is {space!s:.120}, expected Text; "
                "wrap it so that it observes and acts in text (tea_rl.envs.TextEnv shows how)"
            )
    if not isinstance(env.unwrapped, TextEnv):
        env = CompleteInfo(env)
    for wrapper in wrappers:
        env = wrap(env, wrapper["name"], **wrapper.get("kwargs") or {})
    return env


def _spec(id: str) -> Any:
    module, colon, name = id.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TeaError(f"{id}: the module {module} cannot be imported ({error})") from error
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ValueError):
        known = list(gymnasium.registry)
        # "GuessNumber" and "guessnumber-v0" mean ours; did_you_mean compares whole ids.
        short = {
            key.removeprefix(f"{NAMESPACE}/").casefold(): key for key in known if key.startswith(NAMESPACE)
        }
        wanted = name.rpartition("/")[2].casefold()
        close = did_you_mean(wanted if "-v" in wanted else f"{wanted}-v0", short)
        for key, full in short.items():
            close = close.replace(f'"{key}"', f'"{full}"')
        close = close or did_you_mean(name, known)
        raise TeaError(f'there is no environment "{id}".{close} `tea-rl envs` lists ours.') from None


def _refuse_unknown(spec: Any, kwargs: Mapping[str, Any]) -> None:
    """Answer a mistyped setting of our own environments with the nearest one."""
    if not spec.id.startswith(f"{NAMESPACE}/"):
        return
    module, _, name = spec.entry_point.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    settings = [key for key in parameters if key not in ("self", "render_mode")]
    for key in kwargs:
        if key not in settings and key != "render_mode":
            raise TeaError(
                f'{spec.id} has no setting "{key}".{did_you_mean(key, settings)} It has: {", ".join(settings)}.'
            )
