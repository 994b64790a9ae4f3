"""Two records of what a layer did, written as one function of straight calls (`tea_rl.rollout.tape` makes the records and plays)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What may be asked of a tensor without reading its numbers: answers are the same whenever the operations are.
_QUESTIONS = frozenset(
    {"__get__", "size", "dim", "ndimension", "stride", "numel", "is_floating_point", "is_complex"}
    | {"is_inference", "is_contiguous", "element_size", "__len__", "get_device", "type"}
)


class Refused(Exception):
    """A layer does something that cannot be written down."""


class Step(NamedTuple):
    """A call that a layer made, and what it was given back."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Record(NamedTuple):
    """What one layer was given, did and returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: list[Step]
    output: Any


def update_cache(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for the update of a layer's cache in a record."""
    raise NotImplementedError


class Line(NamedTuple):
    """A call as it is written, ``target = text``, and the steps of both records that it stands for."""

    target: str
    text: str
    one: Step
    other: Step


class Written(NamedTuple):
    """A layer's calls as text; names are ``i0``, ... (given tensors), ``v0``, ... (results), ``k0``, ... (constants), ``n`` (rows).

    Attributes:
        lines: the calls.
        inputs: how the given tensors are found in ``args`` and ``kwargs``.
        output: what is returned.
        constants: values of the constants.
        tensors: by name what each tensor was in the two records.
        rows: of the two records.
    """

    lines: list[Line]
    inputs: list[str]
    output: str
    constants: list[Any]
    tensors: dict[str, tuple[Tensor, Tensor]]
    rows: tuple[int, int]


def write(first: Record, second: Record) -> Written:
    """What both records say.

    Raises:
        Refused: they do not say the same, or what cannot be written.
    """
    writer = _Writer(first, second)
    if len(first.steps) != len(second.steps):
        raise Refused("other operations")
    for one, other in zip(first.steps, second.steps, strict=True):
        writer.write(one, other)
    output = writer.value(first.output, second.output)
    return Written(writer.lines, writer.inputs, output, writer.constants, writer.tensors, writer.rows)


def program(written: Written) -> Callable[..., Any]:
    """A function ``(args, kwargs, own)`` that does what is written; ``own`` is the layer's part of the cache."""
    return function("play", ["args", "kwargs", "own"], _body(written), written.constants)


def function(name: str, parameters: list[str], body: list[str], constants: list[Any]) -> Callable[..., Any]:
    """A function of those parameters, and of constants named ``k0``, ``k1``, ..."""
    named = ", ".join([*parameters, *(f"k{number}" for number in range(len(constants)))])
    source = f"def {name}({named}):\n    " + "\n    ".join(body) + "\n"
    return FunctionType(_compiled(source, name), {}, name, tuple(constants))


@cache
def _compiled(source: str, name: str) -> CodeType:
    """The code of a function; layers that differ in their weights only share it."""
    space: dict[str, Any] = {}
    exec(source, {}, space)  # noqa: S102 - of names and numbers that `_Writer` made
    return space[name].__code__


class _Writer:
    """Writes two records of one layer as one function of straight calls."""

    def __init__(self, first: Record, second: Record) -> None:
        self.constants: list[Any] = []
        self._names: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._constant_names: dict[int, str] = {}
        self.lines: list[Line] = []
        self.inputs: list[str] = []
        self.tensors: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps = 0
        self.rows = (0, 0)
        for place, value in enumerate(first.args):
            self._take(f"args[{place}]", value, second.args[place])
        for name, value in first.kwargs.items():
            self._take(f"kwargs[{name!r}]", value, second.kwargs[name])
        if not self.rows[0]:
            raise Refused("no states")

    def _take(self, path: str, one: Any, other: Any) -> None:
        """Name a tensor that the layer is given, or a tuple of them."""
        if isinstance(one, tuple | list):
            for place, (a, b) in enumerate(zip(one, other, strict=True)):
                self._take(f"{path}[{place}]", a, b)
        elif isinstance(one, Tensor) and id(one) not in self._names[0]:
            name = f"i{len(self._names[0])}"
            self._name(one, other, name)
            self.inputs.append(f"{name} = {path}")
            if name == "i0":
                self.rows = (one.shape[0], other.shape[0])
                self.inputs.append("n = i0.shape[0]")

    def _name(self, one: Any, other: Any, name: str) -> None:
        self._names[0][id(one)], self._names[1][id(other)] = name, name
        self.tensors[name] = one, other

    def write(self, one: Step, other: Step) -> None:
        """Write one call."""
        if one.function is not other.function and one.function != other.function:
            raise Refused("other operations")
        tensors = tensors_in(one.output)
        if not tensors:
            if getattr(one.function, "__name__", "") not in _QUESTIONS:
                raise Refused(f"{one.function} reads a tensor")
            return
        called = "own.update" if one.function is update_cache else self._constant(one.function)
        given = [self.value(a, b) for a, b in zip(one.args, other.args, strict=True)]
        if one.kwargs.keys() != other.kwargs.keys():
            raise Refused("other arguments")
        given += [f"{name}={self.value(value, other.kwargs[name])}" for name, value in one.kwargs.items()]
        target = f"v{self._steps}"
        self._steps += 1
        self.lines.append(Line(target, f"{called}({', '.join(given)})", one, other))
        if isinstance(one.output, Tensor):
            self._name(one.output, other.output, target)
        else:
            for place, (a, b) in enumerate(zip(one.output, other.output, strict=True)):
                if isinstance(a, Tensor):
                    self._name(a, b, f"{target}[{place}]")

    def value(self, one: Any, other: Any) -> str:
        """How an argument is written."""
        if isinstance(one, Tensor):
            name = self._names[0].get(id(one))
            if name != self._names[1].get(id(other)) or (name is None and one is not other):
                raise Refused("a tensor from elsewhere")
            return name or self._constant(one)
        if type(one) in (tuple, list, torch.Size) and (tensors_in(one) or one != other):
            parts = [self.value(a, b) for a, b in zip(one, other, strict=True)]
            return f"[{', '.join(parts)}]" if type(one) is list else f"({', '.join(parts)},)"
        if type(one) is int and one != other:
            count = times_rows(one, other, self.rows)
            if count is None:
                raise Refused("a number that depends on the length")
            return "n" if count == 1 else f"n * {count}"
        if type(one) is not type(other) or (one is not other and one != other):
            raise Refused("another constant")
        return repr(one) if one is None or type(one) in (int, bool) else self._constant(one)

    def _constant(self, value: Any) -> str:
        name = self._constant_names.get(id(value))
        if name is None:
            name = self._constant_names[id(value)] = f"k{len(self.constants)}"
            self.constants.append(value)
        return name


def _body(written: Written) -> list[str]:
    """The lines of a function; variables are used again once nothing reads them."""
    lines = [*(f"{line.target} = {line.text}" for line in written.lines), f"return {written.output}"]
    last = {name: number for number, line in enumerate(lines) for name in re.findall(r"\bv\d+\b", line)}
    place: dict[str, str] = {}
    free: list[str] = []
    for number, line in enumerate(lines):
        read = [name for name in dict.fromkeys(re.findall(r"\bv\d+\b", line)) if name in place]
        made = [] if line.startswith("return ") else re.findall(r"\bv\d+\b", line.split(" = ")[0])
        renamed = {name: place[name] for name in read}
        free += [place.pop(name) for name in read if last[name] == number]
        for new in made:
            renamed[new] = place[new] = free.pop() if free else f"t{len(place) + len(free)}"
        free += [place.pop(new) for new in made if last[new] == number]
        lines[number] = re.sub(r"\bv\d+\b", lambda found, r=renamed: r[found.group()], line)  # type: ignore[misc]
    return [*written.inputs, *lines]


def times_rows(one: int, other: int, rows: tuple[int, int]) -> int | None:
    """How many times the rows of both records two numbers are; None if they depend on something else."""
    times, rest = divmod(one, rows[0])
    return None if rest or times * rows[1] != other else times


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, or in a tuple or list."""
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []
