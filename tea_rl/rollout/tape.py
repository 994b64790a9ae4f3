"""One-token steps of a transformer's layers without the Python of their modules.

A layer of a small model is some forty operations of a few microseconds each, and as many calls of Python between them, whose code
the weights of the layer before have driven out of the processor's cache. What the operations are does not change from step to step.
So each layer is watched once (`_Recorder`), and what it did is written down as one function of straight calls that take its place
wherever a token of every row is read over the caches of this package. Everything else goes through the modules as before.

Operations are recorded twice, with other numbers of rows and other lengths. Where both say the same number it is the model's; a
multiple of the rows is written as one; anything else, or a value that was read out of a tensor, and the model keeps its modules. So it does
if what is played differs in a single bit from what the modules say about two other batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicCache

from tea_rl.attention import NAME, OWNER, newest_token
from tea_rl.backbone import Backbone
from tea_rl.compiled import LayerCache
from tea_rl.head.context import layer_list
from tea_rl.rollout.cache import PreallocatedLayer, preallocate
from tea_rl.rollout.shared_prefix import SharedPrefixLayer

#: Rows and lengths that are recorded: no number is a multiple of both rows, or of both lengths, by accident.
_RECORDED = ((7, 5), (11, 6))
#: Rows and lengths that are compared; one row has no padding, and hence no mask.
_COMPARED = ((1, 4), (3, 9))
#: Layers of a cache that play.
_PLAYED = (PreallocatedLayer, SharedPrefixLayer)
#: What may be asked of a tensor without reading its numbers: answers are the same whenever the operations are.
_QUESTIONS = frozenset(
    {"__get__", "size", "dim", "ndimension", "stride", "numel", "is_floating_point", "is_complex"}
    | {"is_inference", "is_contiguous", "element_size", "__len__", "get_device", "type"}
)


class _Refused(Exception):
    """A layer does something that cannot be written down."""


class _Step(NamedTuple):
    """A call that a layer made, and what it was given back."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Recorder(TorchFunctionMode):
    """Writes down every operation on tensors inside; those of cache and attention as one call each."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._paused = False
        #: What the cache returned last, and the same as the layer was given it.
        self._cached: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        output = func(*args, **(kwargs or {}))
        if not self._paused:
            self.steps.append(_Step(func, args, kwargs or {}, output))
        return output

    def update(self, own: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's part: the keys it returns are marked, so that attention to them comes back to `attend`."""
        self._paused = True
        all_keys, all_values = own.update(keys, values)
        known = all_keys.view_as(all_keys), all_values.view_as(all_values)
        setattr(known[0], OWNER, self)
        self._paused = False
        self._cached = (all_keys, all_values, *known)
        self.steps.append(_Step(_update, (keys, values), {}, known))
        return known

    def attend(self, query: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention's part, worked out for what the cache returned last."""
        assert self._cached is not None
        keys, values, known_keys, known_values = self._cached
        self._paused = True
        output = newest_token(query, keys, values, mask, scale)
        self._paused = False
        self.steps.append(_Step(newest_token, (query, known_keys, known_values, mask, scale), {}, output))
        return output


def _update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for the update of a layer's cache in a record."""
    raise NotImplementedError


class _RecordedCache(LayerCache):
    """One layer's cache whose updates are recorded."""

    def __init__(self, own: Any, recorder: _Recorder) -> None:
        super().__init__(own)
        self._recorder = recorder

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self._recorder.update(self.layers[0], key_states, value_states)


class _Record(NamedTuple):
    """What one layer was given, did and returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: list[_Step]
    output: Any


class PlayedLayer:
    """Takes the place of ``layer.forward``: plays where it can, and calls the modules where it cannot.

    Args:
        layer: of the transformer.
        number: of its part of a cache.
    """

    def __init__(self, layer: nn.Module, number: int) -> None:
        self._layer, self._number = layer, number
        self.play: Callable[..., Any] | None = None
        self.records: list[_Record] | None = None
        self._cache_at: int | str = "past_key_values"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.play is not None:
            where = self._cache_at
            kept = kwargs.get(where) if isinstance(where, str) else args[where]
            if kept is not None and (args[0] if args else kwargs["hidden_states"]).shape[1] == 1:
                own = kept.layers[self._number] if self._number < len(kept.layers) else None
                if type(own) in _PLAYED:
                    return self.play(args, kwargs, own)
        elif self.records is not None:
            return self._record(args, kwargs)
        return type(self._layer).forward(self._layer, *args, **kwargs)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        found = [(place, value) for place, value in given if isinstance(value, Cache)]
        own = found[0][1].layers[self._number] if len(found) == 1 else None
        forward = type(self._layer).forward
        if type(own) is not PreallocatedLayer:  # prompts
            return forward(self._layer, *args, **kwargs)
        self._cache_at, recorder = found[0][0], _Recorder()
        part = _RecordedCache(own, recorder)
        own_args = tuple(part if isinstance(value, Cache) else value for value in args)
        own_kwargs = {name: part if isinstance(value, Cache) else value for name, value in kwargs.items()}
        with recorder:
            output = forward(self._layer, *own_args, **own_kwargs)
        assert self.records is not None
        self.records.append(_Record(args, kwargs, recorder.steps, output))
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> PlayedLayer:
        return PlayedLayer(deepcopy(self._layer, memo), self._number)  # its weights are others


class Tape:
    """The layers of a backbone's transformer, played; made by `play_layers`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.players = [PlayedLayer(layer, number) for number, layer in enumerate(layers)]
        self._layers = layers
        self._programs: list[Callable[..., Any]] = []
        self._seen: list[Any] = []

    def install(self) -> None:
        """Put the players where the layers' ``forward`` is."""
        for layer, player in zip(self._layers, self.players, strict=True):
            layer.forward = player  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the layers as they were."""
        for layer in self._layers:
            vars(layer).pop("forward", None)

    def write(self) -> None:
        """Make programs of what the players have recorded twice.

        Raises:
            _Refused: if that cannot be done.
        """
        for player in self.players:
            assert player.records is not None
            self._programs.append(_program(*player.records))
            player.records = None
        self._seen = self._parts()

    def refresh(self) -> None:
        """Play, unless somebody has exchanged a part of a layer, or listens to one, since it was recorded."""
        now = self._parts()
        same = len(now) == len(self._seen) and all(a is b for a, b in zip(now, self._seen, strict=True))
        for player, program in zip(self.players, self._programs, strict=True):
            player.play = program if same else None

    def _parts(self) -> list[Any]:
        """Modules and parameters of all layers, and who hooks into them; hooks of a layer itself are called as ever."""
        parts: list[Any] = []
        for layer in self._layers:
            for module in layer.modules():
                parts.append(module)
                parts += module._parameters.values()
                if module is not layer:
                    parts += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        return parts


def play_layers(backbone: Backbone) -> None:
    """See to it that one-token steps of a backbone on a CPU are played from now on, if its layers let them be.

    The first call takes as long as a dozen steps; later ones look whether the layers are still those that were recorded.
    """
    if not backbone.tape_tried:
        backbone.tape_tried = True
        backbone.tape = _tape(backbone)
    if backbone.tape is not None:
        backbone.tape.refresh()


def _tape(backbone: Backbone) -> Tape | None:
    config = backbone.model.config.get_text_config()
    layers = layer_list(backbone.body, config.num_hidden_layers)
    if (
        backbone.device.type != "cpu"
        or backbone.compile
        or backbone.quantization not in ("none", "w8a8")  # others call what torch does not see
        or config._attn_implementation != NAME
        or layers is None
        or any("forward" in vars(layer) for layer in layers)
    ):
        return None
    tape = Tape(list(layers))
    try:
        expected = [_step(backbone, *shape) for shape in _COMPARED]
        tape.install()
        for player in tape.players:
            player.records = []
        for rows, length in _RECORDED:
            _step(backbone, rows, length)
        tape.write()
        tape.refresh()
        played = [_step(backbone, *shape) for shape in _COMPARED]
        if all(torch.equal(a, b) for a, b in zip(sum(expected, []), sum(played, []), strict=True)):
            return tape
    except Exception:  # a model may do anything while it is recorded, and keeps its modules then
        pass
    tape.remove()
    return None


def _step(backbone: Backbone, rows: int, length: int) -> list[Tensor]:
    """States of the last of so many tokens, and all keys and values; the first row is padded if there are several."""
    # Spread over the vocabulary: its first tokens mean nothing in many models.
    ids = (1000 + 997 * torch.arange(rows * length).view(rows, length)) % backbone.vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = int(rows == 1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cached = DynamicCache(config=backbone.model.config)
    backbone.forward(ids[:, :-1], mask[:, :-1], positions[:, :-1], cached)
    preallocate(cached, length)
    if not all(type(layer) is PreallocatedLayer for layer in cached.layers):
        raise _Refused("another kind of cache")
    states = backbone.forward(ids[:, -1:], mask, positions[:, -1:], cached)
    return [states, *(part for layer in cached.layers for part in (layer.keys, layer.values))]


# -- from two records to a function --------------------------------------------------------------------------------------


def _program(first: _Record, second: _Record) -> Callable[..., Any]:
    """A function ``(args, kwargs, own)`` that does what both records say; ``own`` is the layer's part of the cache."""
    writer = _Writer(first, second)
    if len(first.steps) != len(second.steps):
        raise _Refused("other operations")
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

    def __init__(self, first: _Record, second: _Record) -> None:
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
            raise _Refused("no states")

    def _take(self, path: str, one: Any, other: Any) -> None:
        """Name a tensor that the layer is given, or a tuple of them."""
        if isinstance(one, tuple | list):
            for place, (a, b) in enumerate(zip(one, other, strict=True)):
                self._take(f"{path}[{place}]", a, b)
        elif isinstance(one, Tensor) and id(one) not in self._names[0]:
            name = f"i{len(self._inputs)}"
            if not self._inputs:
                self._rows = (one.shape[0], other.shape[0])
                self._inputs.append("n = i0.shape[0]")
                self._inputs.insert(0, f"i0 = {path}")
                name = "i0"
            else:
                self._inputs.append(f"{name} = {path}")
            self._name(one, other, name)

    def _name(self, one: Any, other: Any, name: str) -> None:
        self._names[0][id(one)], self._names[1][id(other)] = name, name

    def write(self, one: _Step, other: _Step) -> None:
        """Write one call."""
        if one.function is not other.function and one.function != other.function:
            raise _Refused("other operations")
        tensors = _tensors(one.output)
        if not tensors:
            if getattr(one.function, "__name__", "") not in _QUESTIONS:
                raise _Refused(f"{one.function} reads a tensor")
            return
        function = "own.update" if one.function is _update else self._constant(one.function)
        given = [self._value(a, b) for a, b in zip(one.args, other.args, strict=True)]
        if one.kwargs.keys() != other.kwargs.keys():
            raise _Refused("other arguments")
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
                raise _Refused("a tensor from elsewhere")
            return name or self._constant(one)
        if type(one) in (tuple, list, torch.Size) and (_tensors(one) or one != other):
            parts = [self._value(a, b) for a, b in zip(one, other, strict=True)]
            return f"[{', '.join(parts)}]" if type(one) is list else f"({', '.join(parts)},)"
        if type(one) is int and one != other:
            count, rest = divmod(one, self._rows[0])
            if rest or count * self._rows[1] != other:
                raise _Refused("a number that depends on the length")
            return "n" if count == 1 else f"n * {count}"
        if type(one) is not type(other) or (one is not other and one != other):
            raise _Refused("another constant")
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
