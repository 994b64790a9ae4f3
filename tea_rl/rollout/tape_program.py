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


def program(first: Record, second: Record) -> Callable[..., Any]:
    """A function ``(args, kwargs, own)`` that does what both records say; ``own`` is the layer's part of the cache."""
    writer = _Writer(first, second)
    if len(first.steps) != len(second.steps):
        raise Refused("other operations")
    for one, other in zip(first.steps, second.steps, strict=True):
        writer.write(one, other)
    source = writer.source(first.output, second.output)
    return FunctionType(_compiled(source), {}, "play", tuple(writer.constants))


@cache
def _compiled(source: str) -> CodeType:
    """The code of a function; layers that differ in their weights only share it."""
    space: dict[str, Any] = {}
    exec(source, {}, space)  # noqa: S102 - of names and numbers that `_Writer` made
    return space["play"].__code__


class _Writer:
    """Writes two records of one layer as one function of straight calls."""

    def __init__(self, first: Record, second: Record) -> None:
        self.constants: list[Any] = []
        self._names: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._constant_names: dict[int, str] = {}
        self._lines: list[str] = []
        self._inputs: list[str] = []
        self._steps = 0
        self._rows = (0, 0)
        for place, value in enumerate(first.args):
            self._take(f"args[{place}]", value, second.args[place])
        for name, value in first.kwargs.items():
            self._take(f"kwargs[{name!r}]", value, second.kwargs[name])
        if not self._rows[0]:
            raise Refused("no states")

    def _take(self, path: str, one: Any, other: Any) -> None:
        """Name a tensor that the layer is given, or a tuple of them."""
        if isinstance(one, tuple | list):
            for place, (a, b) in enumerate(zip(one, other, strict=True)):
                self._take(f"{path}[{place}]", a, b)
        elif isinstance(one, Tensor) and id(one) not in self._names[0]:
            name = f"i{len(self._names[0])}"
            self._name(one, other, name)
            self._inputs.append(f"{name} = {path}")
            if name == "i0":
                self._rows = (one.shape[0], other.shape[0])
                self._inputs.append("n = i0.shape[0]")

    def _name(self, one: Any, other: Any, name: str) -> None:
        self._names[0][id(one)], self._names[1][id(other)] = name, name

    def write(self, one: Step, other: Step) -> None:
        """Write one call."""
        if one.function is not other.function and one.function != other.function:
            raise Refused("other operations")
        tensors = _tensors(one.output)
        if not tensors:
            if getattr(one.function, "__name__", "") not in _QUESTIONS:
                raise Refused(f"{one.function} reads a tensor")
            return
        function = "own.update" if one.function is update_cache else self._constant(one.function)
        given = [self._value(a, b) for a, b in zip(one.args, other.args, strict=True)]
        if one.kwargs.keys() != other.kwargs.keys():
            raise Refused("other arguments")
        given += [f"{name}={self._value(value, other.kwargs[name])}" for name, value in one.kwargs.items()]
        target = f"v{self._steps}"
        self._steps += 1
        self._lines.append(f"{target} = {function}({', '.join(given)})")
        if isinstance(one.output, Tensor):
            self._name(one.output, other.output, target)
        else:
            for place, (a, b) in enumerate(zip(one.output, other.output, strict=True)):
                if isinstance(a, Tensor):
                    self._name(a, b, f"{target}[{place}]")

    def _value(self, one: Any, other: Any) -> str:
        """How an argument is written."""
        if isinstance(one, Tensor):
            name = self._names[0].get(id(one))
            if name != self._names[1].get(id(other)) or (name is None and one is not other):
                raise Refused("a tensor from elsewhere")
            return name or self._constant(one)
        if type(one) in (tuple, list, torch.Size) and (_tensors(one) or one != other):
            parts = [self._value(a, b) for a, b in zip(one, other, strict=True)]
            return f"[{', '.join(parts)}]" if type(one) is list else f"({', '.join(parts)},)"
        if type(one) is int and one != other:
            count, rest = divmod(one, self._rows[0])
            if rest or count * self._rows[1] != other:
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

    def source(self, one: Any, other: Any) -> str:
        """The whole function, its constants as parameters; variables are used again once nothing reads them."""
        lines = [*self._lines, f"return {self._value(one, other)}"]
        last = {name: number for number, line in enumerate(lines) for name in re.findall(r"\bv\d+\b", line)}
        place: dict[str, str] = {}
        free: list[str] = []
        for number, line in enumerate(lines):
            read = [name for name in dict.fromkeys(re.findall(r"\bv\d+\b", line)) if name in place]
            new = line.split(" = ")[0] if " = " in line and re.match(r"v\d+ = ", line) else None
            renamed = {name: place[name] for name in read}
            free += [place.pop(name) for name in read if last[name] == number]
            if new is not None:
                renamed[new] = place[new] = free.pop() if free else f"t{len(place) + len(free)}"
                if last[new] == number:
                    free.append(place.pop(new))
            lines[number] = re.sub(r"\bv\d+\b", lambda found, r=renamed: r[found.group()], line)  # type: ignore[misc]
        parameters = ", ".join(["args", "kwargs", "own", *(f"k{n}" for n in range(len(self.constants)))])
        body = "\n    ".join([*self._inputs, *lines])
        return f"def play({parameters}):\n    {body}\n"


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, or in a tuple or list."""
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []
