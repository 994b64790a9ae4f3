"""One-token steps of a transformer on a GPU through `torch.compile`, layer by layer, so that all layers share one compiled code.

Tested on a CPU, where `tea_rl.rollout.fusion` takes its place; nobody has run it on a GPU yet.

Compiled as a whole, a transformer of 30 layers is 30 times the code: minutes instead of seconds. For one code to fit all of
them, nothing that a layer is given may name the layer, so each gets its own part of the cache only (`LayerCache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from tea_rl.errors import TeaError
from tea_rl.head.context import layer_list

#: What `torch.compile` is given; its default generates C++ on a CPU, and Triton on a GPU.
COMPILE_BACKEND = "inductor"


class LayerCache(Cache):
    """The part of a cache that belongs to one layer, whatever number that layer asks for."""

    def __init__(self, own: DynamicLayer) -> None:
        super().__init__(layers=[own])

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,  # noqa: ARG002
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values, and return all of them."""
        return self.layers[0].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Tokens that are kept."""
        return self.layers[0].get_seq_length()


class CompiledLayers:
    """The layers of a transformer, compiled for any number of rows and any length.

    Args:
        body: the transformer.
        count: how many layers it has.

    Raises:
        TeaError: no such list of layers is found in it.
        RuntimeError: Python or system are none that `torch.compile` serves.
    """

    def __init__(self, body: nn.Module, count: int) -> None:
        layers = layer_list(body, count) or ()
        # A layer that reads another one's part of the cache stays as it is.
        self._layers = [layer if _numbers(layer) == {place} else None for place, layer in enumerate(layers)]
        if not any(self._layers):
            raise TeaError(
                f"model.compile is true, but {type(body).__name__} has no list of {count} layers with a part of the cache each: "
                "set model.compile to false"
            )
        self._run = torch.compile(_forward, dynamic=True, backend=COMPILE_BACKEND)

    @contextmanager
    def stepping(self, cache: Cache) -> Iterator[None]:
        """Inside, the transformer reads and extends ``cache`` with compiled layers; outside it is as it was."""
        changed = []
        for layer, own in zip(self._layers, cache.layers, strict=False):
            # Another's patch of forward (offloading, say) is left in charge.
            if layer is not None and isinstance(own, DynamicLayer) and "forward" not in vars(layer):
                layer.forward = self._with_own_cache(layer, cache, own)  # type: ignore[method-assign]
                changed.append(layer)
        try:
            yield
        finally:
            for layer in changed:
                del layer.forward

    def _with_own_cache(self, layer: nn.Module, cache: Cache, own: DynamicLayer) -> Callable[..., Any]:
        part = LayerCache(own)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given, named = exchanged(cache, part, args, kwargs)
            return self._run(layer, *given, **named)

        return forward


def exchanged(
    old: Any, new: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call, with one object in the place of another."""
    given = [new if value is old else value for value in args]
    return given, {name: new if value is old else value for name, value in kwargs.items()}


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _numbers(layer: nn.Module) -> set[int]:
    """The numbers under which parts of a layer know the cache."""
    numbers = (getattr(part, "layer_idx", None) for part in layer.modules())
    return {number for number in numbers if isinstance(number, int)}
