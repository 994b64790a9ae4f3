"""From reward names to one function: look up, check, weigh, sum."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from tea_rl.errors import TeaError, did_you_mean
from tea_rl.rewards.builtin import BUILTIN_REWARDS, RewardFunction

if TYPE_CHECKING:
    from tea_rl.recipe import RewardSpec


class Rewards(Protocol):
    """What scores completions: `RewardSum` here, `RewardWorkers` in processes of their own."""

    def __call__(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]] | None = None
    ) -> RewardBatch:
        """Rewards of a batch."""


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of a batch of completions.

    Attributes:
        total: weighted sum of the terms, one number a row; NaN where a worker did not answer.
        terms: unweighted values by term; ``None`` where a term does not apply to a row.
    """

    total: list[float]
    terms: dict[str, list[float | None]]


@dataclass(frozen=True)
class _Term:
    label: str
    weight: float
    function: RewardFunction


class RewardSum:
    """Weighted sum of reward functions; call it with a batch."""

    def __init__(self, terms: Sequence[_Term]) -> None:
        self.terms = tuple(terms)

    @property
    def names(self) -> list[str]:
        """Labels of the terms, as they appear in ``reward/<name>``."""
        return [term.label for term in self.terms]

    def __call__(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]] | None = None
    ) -> RewardBatch:
        """Score completions.

        Args:
            prompts, completions: texts, one a row.
            columns: further data columns, one value a row each.

        Raises:
            TeaError: if a function raises, returns the wrong number of values or something that is not a finite number or
                ``None``, or if no term applies to a row.
        """
        columns = columns or {}
        for name, values in (("completions", completions), *columns.items()):
            if len(values) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(values)} values of {name}")
        terms = {term.label: _call(term, prompts, completions, columns) for term in self.terms}
        total = []
        for row in range(len(prompts)):
            parts = [t.weight * terms[t.label][row] for t in self.terms if terms[t.label][row] is not None]  # type: ignore[operator]
            if not parts:
                raise TeaError(
                    f"no reward applies to row {row} (prompt {_short(prompts[row])}): expected a number from at least one "
                    f"of {', '.join(self.names)}, got None from all; return a number or drop the prompt."
                )
            total.append(math.fsum(parts))
        return RewardBatch(total, terms)


def load_rewards(specs: Sequence[RewardSpec], base_dir: Path | str = ".") -> RewardSum:
    """Find the reward functions of a recipe and check their settings.

    Args:
        specs: name, weight and kwargs of each term.
        base_dir: folder against which relative files are resolved.

    Raises:
        TeaError: for an unknown name, a file or function that is not there, a file that fails to load, or settings that the
            reward does not take.
    """
    terms: list[_Term] = []
    for spec in specs:
        if spec.name in BUILTIN_REWARDS:
            label, function = spec.name, _builtin(spec.name, dict(spec.kwargs), Path(base_dir))
        elif ":" in spec.name or spec.name.endswith(".py"):
            label, function = _from_file(spec.name, dict(spec.kwargs), Path(base_dir))
        else:
            raise TeaError(
                f'no reward is called "{spec.name}".{did_you_mean(spec.name, BUILTIN_REWARDS)} '
                f"Built in: {', '.join(BUILTIN_REWARDS)}; or give path/to/file.py:function."
            )
        used = [term.label for term in terms]
        number = 2
        unique = label
        while unique in used:
            unique, number = f"{label}_{number}", number + 1
        terms.append(_Term(unique, spec.weight, function))
    if not terms:
        raise TeaError("expected at least one reward, got none; name one, such as sentiment.")
    return RewardSum(terms)


def _builtin(name: str, kwargs: dict[str, Any], base_dir: Path) -> RewardFunction:
    factory = BUILTIN_REWARDS[name]
    _check_kwargs(name, factory, kwargs, provided=())
    if name == "json_schema" and isinstance(kwargs.get("schema"), str):
        kwargs["schema"] = str(base_dir / kwargs["schema"])
    return factory(**kwargs)


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _check_kwargs(
    name: str, function: Callable[..., Any], kwargs: Mapping[str, Any], provided: Sequence[str]
) -> None:
    """Refuse settings the function does not take and, for a built-in, settings that are missing."""
    parameters = inspect.signature(function).parameters
    takes_any = _takes_any(function)
    named = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = [parameter for parameter in named if parameter not in provided]
    for key in kwargs:
        if key in provided or (key not in named and not takes_any):
            takes = f"It takes: {', '.join(own)}." if own else "It takes none."
            raise TeaError(
                f'the reward "{name}" has no setting "{key}".{did_you_mean(key, own) or " " + takes}'
            )
    if provided:
        return
    for key in own:
        if parameters[key].default is inspect.Parameter.empty and key not in kwargs:
            raise TeaError(f'the reward "{name}" needs the setting "{key}": write kwargs: {{{key}: ...}}.')


def _from_file(name: str, kwargs: dict[str, Any], base_dir: Path) -> tuple[str, RewardFunction]:
    file, colon, attribute = name.rpartition(":")
    if not colon or not file or not attribute or not file.endswith(".py"):
        raise TeaError(f'expected a reward as path/to/file.py:function, got "{name}".')
    path = (base_dir / Path(file).expanduser()).resolve()
    if not path.is_file():
        raise TeaError(f'the reward "{name}" needs the file {path}, which does not exist; check the path.')
    module = _load_module(path)
    function = getattr(module, attribute, None)
    public = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
    ]
    if function is None:
        defined = f" It defines: {', '.join(public)}." if public else " It defines no function."
        raise TeaError(
            f'{path.name} has no function "{attribute}".{did_you_mean(attribute, public) or defined}'
        )
    if not callable(function) or inspect.isclass(function):
        raise TeaError(
            f"expected a function as {path.name}:{attribute}, got a {'class' if inspect.isclass(function) else type(function).__name__}."
        )
    if inspect.iscoroutinefunction(function):
        raise TeaError(
            f'expected a function as {path.name}:{attribute}, got an async one; write it with plain "def".'
        )
    parameters = inspect.signature(function).parameters
    if not {"prompts", "completions"} <= parameters.keys() and not _takes_any(function):
        raise TeaError(
            f"expected {path.name}:{attribute} to take (prompts, completions, **columns), got "
            f"({', '.join(parameters)}); add them."
        )
    _check_kwargs(name, function, kwargs, provided=("prompts", "completions"))
    return attribute, _with_settings(function, kwargs)


def _load_module(path: Path) -> ModuleType:
    name = f"tea_rl_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up by name
    sys.path.insert(0, str(path.parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
        raise TeaError(f"{path} line {line} fails to load: {_one_line(error)}; mend the file.") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _with_settings(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> RewardFunction:
    """Bind the recipe's settings, and pass only the columns that the function names unless it takes ``**columns``."""
    parameters = inspect.signature(function).parameters
    takes_any = _takes_any(function)
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in ("prompts", "completions") and p.name not in kwargs
    ]  # fmt: skip

    def call(prompts: list[str], completions: list[str], **columns: Any) -> Any:
        missing = [name for name in needed if name not in columns]
        if missing:
            known = ", ".join(columns) or "none"
            raise TeaError(
                f'its parameter "{missing[0]}" is neither a data column (columns: {known}) nor set in kwargs.'
            )
        taken = columns if takes_any else {key: value for key, value in columns.items() if key in parameters}
        # Settings win over a column of the same name: they were written for this reward.
        return function(prompts=prompts, completions=completions, **{**taken, **kwargs})

    call.__wrapped__ = function  # type: ignore[attr-defined]  # its file tells where an error arose
    return call


def _call(
    term: _Term, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
) -> list[float | None]:
    try:
        values = term.function(prompts=prompts, completions=completions, **columns)
    except TeaError as error:
        raise TeaError(f'reward "{term.label}": {error}') from error
    except (Exception, SystemExit) as error:
        source = inspect.getsourcefile(inspect.unwrap(term.function))
        where = f" ({Path(source).name} line {_line_in(Path(source), error)})" if source else ""
        raise TeaError(
            f'reward "{term.label}" raised {_one_line(error)}{where} on rows 0 to {len(prompts) - 1}; mend it or return None '
            "for rows it cannot score."
        ) from error
    if hasattr(values, "tolist"):  # arrays and tensors
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise TeaError(
            f'reward "{term.label}": expected a list of numbers, got {type(values).__name__}; return a list.'
        )
    if len(values) != len(prompts):
        raise TeaError(
            f'reward "{term.label}": expected {len(prompts)} values, one a row, got {len(values)}.'
        )
    return [_number(term.label, row, value, completions[row]) for row, value in enumerate(values)]


def _number(label: str, row: int, value: Any, completion: str) -> float | None:
    if value is None:
        return None
    what = f"{type(value).__name__} {_short(value)}"
    if not isinstance(value, (str, bytes)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if math.isfinite(number):
                return number
            what = f"{number}"
    raise TeaError(
        f'reward "{label}": expected a finite number or None for row {row} (completion {_short(completion)}), got {what}.'
    )


def _line_in(path: Path, error: BaseException) -> int | str:
    """Line of ``path`` that was running when the error arose."""
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name
    ]
    return lines[-1] if lines and lines[-1] is not None else "?"


def _one_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(value: Any, limit: int = 50) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
