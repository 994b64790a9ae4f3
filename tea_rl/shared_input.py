"""Linear layers that read the same input (queries, keys and values; gate and up): one product for all of them.

Where a step has one row, a product costs as much in starting it as in reading its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class _Known(NamedTuple):
    """A product's parts, the input it is of (as it was), and how many layers have not taken theirs."""

    x: Tensor
    version: int
    parts: Sequence[Tensor]
    left: int


class OneProduct:
    """The first layer that is asked multiplies for all, the others take their part.

    What is known is replaced as a whole, so that threads which share a model can disturb, but never mislead each other.

    Args:
        sizes: outputs of each layer, side by side.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self._known: _Known | None = None

    def part(self, x: Tensor, number: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The outputs of layer ``number`` in ``product(x)``, worked out once while all layers are given the same tensor."""
        if len(self._sizes) == 1:
            return product(x)
        # Tensors made in inference mode do not tell that they were changed in place; nothing between siblings does that.
        version, known = -1 if x.is_inference() else x._version, self._known
        if known is None or known.x is not x or known.version != version:
            known = _Known(x, version, product(x).split_with_sizes(self._sizes, -1), len(self._sizes))
        left = known.left - 1
        self._known = _Known(x, version, known.parts, left) if left else None
        return known.parts[number]


@contextmanager
def inputs_by_layer(body: nn.Module) -> Iterator[dict[nn.Linear, Tensor]]:
    """The newest input of every linear layer of ``body`` that is asked inside; one object where layers share it."""
    inputs: dict[nn.Linear, Tensor] = {}

    def record(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        inputs[layer] = given[0]

    hooks = [layer.register_forward_pre_hook(record) for layer in body.modules() if type(layer) is nn.Linear]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def with_same_input(inputs: dict[nn.Linear, Tensor]) -> list[list[nn.Linear]]:
    """The layers of `inputs_by_layer`, those together that were given one tensor."""
    groups: dict[int, list[nn.Linear]] = {}
    for layer, rows in inputs.items():
        groups.setdefault(id(rows), []).append(layer)
    return list(groups.values())
