"""One-token steps of a transformer's layers without the Python of their modules.

A layer of a small model is some forty operations of a few microseconds each, and as many calls of Python between them, whose code
the weights of the layer before have driven out of the processor's cache. What the operations are does not change from step to step.
So each layer is watched once (`_Recorder`), and what it did is written down as one function of straight calls that take its place
wherever a token of every row is read over the caches of this package. Everything else goes through the modules as before.

Operations are recorded twice, with other numbers of rows and other lengths. Where both say the same number it is the model's; a
multiple of the rows is written as one; anything else, or a value that was read out of a tensor, and the model keeps its modules. So it does
if what is played differs in a single bit from what the modules say about two other batches. What cannot be noticed is a layer that does
something else beyond some number of rows or tokens (none is known).

Only `tea_rl.rollout.sequences.Sequences` plays, and looks at the layers before its first step: they are recorded anew if a part of them was
exchanged, and called as long as somebody hooks into one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from tea_rl.attention import NAME, OWNER, newest_token
from tea_rl.backbone import Backbone
from tea_rl.compiled import LayerCache, exchanged
from tea_rl.generated import CompilerFailed, compiler_failed
from tea_rl.head.context import layer_list
from tea_rl.rollout.cache import PreallocatedLayer, preallocate
from tea_rl.rollout.fusion import fused
from tea_rl.rollout.probe_step import ProbeStep, close_to
from tea_rl.rollout.shared_prefix import SharedPrefixLayer
from tea_rl.rollout.tape_program import Record, Refused, Step, program, update_cache, write

_log = logging.getLogger(__name__)
#: Rows and lengths that are recorded: no number is a multiple of both rows, or of both lengths, by accident.
_RECORDED = ((7, 5), (11, 6))
#: Rows and lengths that are compared: one row, which has no padding and hence no mask, and more than were recorded.
_COMPARED = ((1, 4), (24, 17))
_NOT_COMPILED = ", and model.compile changes nothing"
#: Layers of a cache that play.
_PLAYED = (PreallocatedLayer, SharedPrefixLayer)


class _Recorder(TorchFunctionMode):
    """Writes down every operation on tensors inside; those of cache and attention as one call each."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._paused = False
        #: What the cache returned last, and the same as the layer was given it.
        self._cached: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        output = func(*args, **(kwargs or {}))
        if not self._paused:
            self.steps.append(Step(func, args, kwargs or {}, output))
        return output

    def update(self, own: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's part: the keys it returns are marked, so that attention to them comes back to `attend`."""
        self._paused = True
        all_keys, all_values = own.update(keys, values)
        known = all_keys.view_as(all_keys), all_values.view_as(all_values)
        setattr(known[0], OWNER, self)
        self._paused = False
        self._cached = (all_keys, all_values, *known)
        self.steps.append(Step(update_cache, (keys, values), {}, known))
        return known

    def attend(self, query: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention's part, worked out for what the cache returned last."""
        assert self._cached is not None
        keys, values, known_keys, known_values = self._cached
        self._paused = True
        output = newest_token(query, keys, values, mask, scale)
        self._paused = False
        self.steps.append(Step(newest_token, (query, known_keys, known_values, mask, scale), {}, output))
        return output


class _RecordedCache(LayerCache):
    """One layer's cache whose updates are recorded."""

    def __init__(self, own: Any, recorder: _Recorder) -> None:
        super().__init__(own)
        self._recorder = recorder

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self._recorder.update(self.layers[0], key_states, value_states)


class PlayedLayer:
    """Takes the place of ``layer.forward``: plays while its tape is on, and else calls the modules.

    Copied or pickled with its layer it has no tape, and calls the modules always.

    Args:
        layer: of the transformer.
        number: of its part of a cache.
        tape: that it belongs to.

    Attributes:
        play: what it plays, a function of positional arguments, named ones and its part of the cache.
        records: of the steps while it is watched; None while it is not.
    """

    def __init__(self, layer: nn.Module, number: int, tape: Tape) -> None:
        self._layer, self._number = layer, number
        self._tape: Tape | None = tape
        self.play: Callable[..., Any] | None = None
        self.records: list[Record] | None = None
        self._cache_at: int | str = "past_key_values"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._tape is not None and self._tape.on_in == get_ident():
            if self.records is not None:
                return self._record(args, kwargs)
            assert self.play is not None
            where = self._cache_at
            kept = kwargs[where] if isinstance(where, str) else args[where]
            own = kept.layers[self._number]
            if type(own) in _PLAYED:
                return self.play(args, kwargs, own)
        return type(self._layer).forward(self._layer, *args, **kwargs)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        found = [(place, value) for place, value in given if isinstance(value, Cache)]
        if len(found) != 1:
            raise Refused("no cache, or two")
        self._cache_at, recorder = found[0][0], _Recorder()
        part = _RecordedCache(found[0][1].layers[self._number], recorder)
        own_args, own_kwargs = exchanged(found[0][1], part, args, kwargs)
        with recorder:
            output = type(self._layer).forward(self._layer, *own_args, **own_kwargs)
        assert self.records is not None
        self.records.append(Record(args, kwargs, recorder.steps, output))
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tape": None, "play": None, "records": None}


class Tape:
    """The layers of a backbone's transformer, as they are played; made by `tape_of`.

    Attributes:
        refused: why nothing is played; None if it is.
        on_in: the thread whose steps are played (or recorded) now.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._layers = _layers(backbone)
        self._players = [PlayedLayer(layer, number, self) for number, layer in enumerate(self._layers)]
        self._parts = self._look()
        self.refused: str | None = None
        self.on_in: int | None = None
        try:
            self._record()
        except CompilerFailed as error:
            raise compiler_failed(backbone.name_or_path, error) from error
        except Exception as error:  # a model may do anything while it is recorded, and keeps its modules then
            self.refused = f"{type(error).__name__}: {error}"
            say = _log.warning if backbone.compile else _log.debug
            say(
                "layers of %s are not played%s: %s",
                backbone.name_or_path,
                _NOT_COMPILED * backbone.compile,
                self.refused,
            )
        finally:
            if self.refused is not None or any(player.play is None for player in self._players):
                self.remove()

    def remove(self) -> None:
        """Leave the layers as they were."""
        for layer, player in zip(self._layers, self._players, strict=True):
            player.play = player.records = None
            if vars(layer).get("forward") is player:
                del layer.forward

    def is_current(self) -> bool:
        """Whether the layers are still those that were recorded, as far as can be seen without calling them."""
        now = self._look()
        same = (a is b or (type(a) is tuple and a == b) for a, b in zip(now, self._parts, strict=False))
        return len(now) == len(self._parts) and all(same)

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Inside, this thread's steps are played."""
        self.on_in = get_ident()
        try:
            yield
        finally:
            self.on_in = None

    def _record(self) -> None:
        """Watch, write and compare."""
        if not self._layers:
            raise Refused("not a model whose layers can be watched")
        recorded, compared = (
            [ProbeStep(self._backbone, *shape) for shape in s] for s in (_RECORDED, _COMPARED)
        )
        expected = [_step(probe) for probe in compared]
        for layer, player in zip(self._layers, self._players, strict=True):
            layer.forward, player.records = player, []  # type: ignore[assignment]
        with self.playing():
            for probe in recorded:
                _step(probe)
            written = [write(*player.records or ()) for player in self._players]
            if self._backbone.compile:
                written = [fused(layer) for layer in written]
            programs = [program(layer) for layer in written]
            for player, play in zip(self._players, programs, strict=True):
                player.play, player.records = play, None
            played = [_step(probe) for probe in compared]
        # Pieces round less often than the modules.
        same = close_to(self._backbone) if self._backbone.compile else torch.equal
        if not all(same(a, b) for a, b in zip(sum(played, []), sum(expected, []), strict=True)):
            raise Refused("what is played is not what the modules say")

    def _look(self) -> list[Any]:
        """What may be exchanged in the layers: modules, tensors and their formats, numbers, and functions in the place of others."""
        parts: list[Any] = [self._backbone.model.config.get_text_config()._attn_implementation]
        for layer in self._layers:
            for module in layer.modules():
                parts += [module, type(module).forward]
                parts += [value for value in vars(module).values() if type(value) in (bool, int, float)]
                parts += [None if module is layer else vars(module).get("forward")]
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    parts += [
                        tensor,
                        *(() if tensor is None else (tensor.dtype, (tensor.shape, _strides(tensor)))),
                    ]
        return parts

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the backbone has other layers


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout == torch.strided else None


def tape_of(backbone: Backbone) -> Tape | None:
    """The tape of a backbone's layers as they are now; None where they must be called: somebody hooks into them, or they cannot be played.

    The first call, and one after a part was exchanged, takes as long as a dozen steps.
    """
    current = backbone.tape is not None and backbone.tape.is_current()
    if torch.is_autocast_enabled("cpu") or _are_heard(_layers(backbone), current):
        return None
    if not current:
        if backbone.tape is not None:
            backbone.tape.remove()
        backbone.tape = Tape(backbone)
    return None if backbone.tape.refused else backbone.tape


def _layers(backbone: Backbone) -> list[nn.Module]:
    """The layers of a model that may be watched; none where it may not."""
    config = backbone.model.config.get_text_config()
    layers = list(layer_list(backbone.body, config.num_hidden_layers) or ())
    watched = (
        backbone.device.type == "cpu"
        and backbone.quantization in ("none", "w8a8")  # others call what torch does not see
        and config._attn_implementation == NAME
        and not any(_is_patched(layer) for layer in layers)
    )
    return layers if watched else []


def _is_patched(layer: nn.Module) -> bool:
    """Whether somebody else has put a function in the place of its ``forward``."""
    return "forward" in vars(layer) and not isinstance(vars(layer)["forward"], PlayedLayer)


def _are_heard(layers: Sequence[nn.Module], recorded: bool) -> bool:
    """Whether somebody hooks into the layers. Hooks of a layer itself are called as ever, but should not hear it recorded."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return True
    return any(
        module._forward_hooks or module._forward_pre_hooks
        for layer in layers
        for module in layer.modules()
        if not (recorded and module is layer)
    )


def _step(probe: ProbeStep) -> list[Tensor]:
    """States of a step over caches that play, and all keys and values after it.

    Raises:
        Refused: if the model's cache is of another kind.
    """

    def prepare(cache: Cache) -> None:
        preallocate(cache, probe.mask.shape[1])
        if not all(type(layer) is PreallocatedLayer for layer in cache.layers):
            raise Refused("another kind of cache")

    states = probe.run(prepare)
    return [states, *(part for layer in probe.cache.layers for part in (layer.keys, layer.values))]
