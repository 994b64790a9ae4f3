"""Small operations of a played layer that follow one another, as one function of CPU code that `torch.compile`'s compiler writes.

Between the products of a layer stand norms, rotations, activations and sums: some thirty operations of microseconds each, every one
of which reads and writes memory. Here each run of them between two products becomes one function (a *piece*). Products, attention and
the cache stay the calls that they were, and one piece serves all layers that differ in their weights only. Numbers are not rounded
between the operations of a piece, so states differ from the modules' by rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tea_rl.attention import compiled_newest_token, newest_token
from tea_rl.generated import Generated, generate, numbers_unlike
from tea_rl.rollout.tape_program import Line, Written, function, tensors_in, times_rows

#: Calls that no piece contains: products, and what has a good kernel of its own. So are all that are not torch's own methods.
_APART = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm"}
    | {
        "einsum",
        "tensordot",
        "_int_mm",
        "conv1d",
        "scaled_dot_product_attention",
        "embedding",
        "embedding_bag",
    }
)
_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__"})
#: Fewer operations are not worth the call.
_FEWEST = 2
_VARIABLE = re.compile(r"\bv\d+\b")
_NAME = re.compile(r"\bv\d+(?:\[\d+\])?|\b[ik]\d+\b")


class _Known(NamedTuple):
    """A piece, and the constants whose names in its key must not become others'."""

    call: Generated
    constants: list[Any]


#: Pieces by their source, constants and the layout of what they are given; in all backbones.
_pieces: dict[Any, _Known | None] = {}


def fused(written: Written) -> Written:
    """What is written, with pieces in the place of small operations.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    lines: list[Line] = []
    constants = [compiled_newest_token if value is newest_token else value for value in written.constants]
    runs = _runs(written.lines)
    for number, run in enumerate(runs):
        after = [line.text for later in runs[number + 1 :] for line in later]
        lines += _fused_run(run, _variables([*after, written.output]), written, constants)
    return written._replace(lines=lines, constants=constants)


def _runs(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines cut before and after every call that stands apart."""
    runs: list[list[Line]] = [[]]
    for line in lines:
        if _stands_apart(line):
            runs += [[line], []]
        else:
            runs[-1].append(line)
    return runs


def _stands_apart(line: Line) -> bool:
    called = line.one.function
    ours = not str(getattr(called, "__module__", None) or "torch").startswith("torch")
    operator = isinstance(called, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    if ours or operator or getattr(called, "__name__", "") in _APART:
        return True
    return not isinstance(line.one.output, Tensor) and not _is_view(line)  # several results


def _is_view(line: Line) -> bool:
    """Whether a call computes nothing: what it returned lies in what it was given."""
    if _is_in_place(line):
        return False
    given = {t.untyped_storage().data_ptr() for t in tensors_in([*line.one.args, *line.one.kwargs.values()])}
    return all(t.untyped_storage().data_ptr() in given for t in tensors_in(line.one.output))


def _is_in_place(line: Line) -> bool:
    name = getattr(line.one.function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def _variables(texts: Sequence[str]) -> set[str]:
    return {name for text in texts for name in _VARIABLE.findall(text)}


def _fused_run(run: list[Line], read_later: set[str], written: Written, constants: list[Any]) -> list[Line]:
    """The lines that take a run's place; the piece is put at the end of ``constants``."""
    if len(run) < _FEWEST:
        return run
    computes = [line for line in run if not _is_view(line)]
    if len(computes) < _FEWEST:
        return run
    # Views are taken again outside, if anybody wants them there: a piece returns what it computed only.
    computed = {line.target for line in computes}
    views, wanted = _needed([line for line in run if line.target not in computed], read_later)
    outputs = [line.target for line in computes if line.target in wanted]
    # What is changed in place may be read under an older name.
    body, _ = _needed(run, {*outputs, *(line.target for line in computes if _is_in_place(line))})
    piece = _piece(body, outputs, written)
    if piece is None:
        return run
    given, call = piece
    constants.append(call)
    text = f"k{len(constants) - 1}([{', '.join(given)}])"
    return [Line(f"{', '.join(outputs)},", text, *body[-1][2:]), *views]


def _needed(lines: list[Line], wanted: set[str]) -> tuple[list[Line], set[str]]:
    """Those of some lines that are wanted, by one another as well, and all that is wanted then."""
    kept: list[Line] = []
    wanted = set(wanted)
    for line in reversed(lines):
        if line.target in wanted:
            kept.insert(0, line)
            wanted |= _variables([line.text])
    return kept, wanted


def _piece(body: list[Line], outputs: list[str], written: Written) -> tuple[list[str], Generated] | None:
    """What a piece is given, and the piece; None if it cannot be one."""
    made = {line.target for line in body}
    given: dict[str, str] = {}
    own_constants: dict[str, str] = {}
    constants: list[Any] = []

    def renamed(found: re.Match[str]) -> str:
        name = found.group()
        if name.split("[")[0] in made:
            return name
        if name in written.tensors:
            return given.setdefault(name, f"a{len(given)}")
        if name not in own_constants:
            value = written.constants[int(name[1:])]
            if isinstance(value, Tensor):  # differs from layer to layer
                return given.setdefault(name, f"a{len(given)}")
            own_constants[name] = f"k{len(constants)}"
            constants.append(value)
        return own_constants[name]

    lines = [f"{line.target} = {_NAME.sub(renamed, line.text)}" for line in body]
    lines.append(f"return ({', '.join(outputs)},)")
    pairs = [_recorded(name, written) for name in given]
    found = _examples(pairs, written.rows)
    if found is None:
        return None
    examples, free = found
    counted = [
        at for at, (one, other) in enumerate(pairs) if (*one.shape[:1], *other.shape[:1]) == written.rows
    ]
    if any(re.search(r"\bn\b", line) for line in lines):
        if not counted:
            return None
        lines.insert(0, f"n = a{counted[0]}.shape[0]")
    layout = tuple((e.shape, e.stride(), e.dtype) for e in examples)
    key = ("\n".join(lines), tuple(map(repr, constants)), layout, torch.get_num_threads())
    if key not in _pieces:
        call = generate(function("piece", list(given.values()), lines, constants), examples, free)
        _pieces[key] = None if call is None else _Known(call, constants)
    known = _pieces[key]
    return None if known is None else (list(given), known.call)


def _recorded(name: str, written: Written) -> tuple[Tensor, Tensor]:
    """What a tensor was in both records."""
    if name in written.tensors:
        return written.tensors[name]
    value = written.constants[int(name[1:])]
    return value, value


def _examples(
    pairs: Sequence[tuple[Tensor, Tensor]], rows: tuple[int, int]
) -> tuple[list[Tensor], set[int]] | None:
    """Tensors laid out as those of two records would be with another number of rows, and the sizes that hang on it; None if others do."""
    sizes = {size for one, _ in pairs for size in (*one.shape, *one.stride())}
    count = next(numbers_unlike(sizes))
    examples = []
    free: set[int] = set()
    for one, other in pairs:
        shape = [_scaled(a, b, rows, count) for a, b in zip(one.shape, other.shape, strict=True)]
        stride = [_scaled(a, b, rows, count) for a, b in zip(one.stride(), other.stride(), strict=True)]
        if None in shape or None in stride:
            return None
        free |= {size for a, b, size in zip(one.shape, other.shape, shape, strict=True) if a != b}  # type: ignore[misc]
        examples.append(torch.empty_strided(shape, stride, dtype=one.dtype))  # type: ignore[arg-type]
    return examples, free


def _scaled(one: int, other: int, rows: tuple[int, int], count: int) -> int | None:
    """What is ``one`` with ``rows[0]`` and ``other`` with ``rows[1]`` rows, for ``count`` rows; None if it depends on more."""
    if one == other:
        return one
    times = times_rows(one, other, rows)
    return None if times is None else times * count
