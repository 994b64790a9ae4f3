"""Linear layers that read the same input (queries, keys and values; gate and up): one product for all of them.

Where a step has one row, a product costs as much in starting it as in reading its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class SharedProduct:
    """The first layer that is asked multiplies for all, the others take their columns.

    Args:
        members: how many layers there are.
    """

    def __init__(self, members: int) -> None:
        self._members, self._left = members, 0
        self._input: Tensor | None = None
        self._version = -1
        self._output: Tensor | None = None

    def columns(self, x: Tensor, start: int, end: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        """``product(x)[..., start:end]``, worked out once while all members are given the same tensor."""
        version = -1 if x.is_inference() else x._version
        if self._input is not x or self._version != version or self._output is None:
            self._input, self._version, self._left = x, version, self._members
            self._output = product(x)
        part = self._output[..., start:end]
        self._left -= 1
        if self._left == 0:
            self._input = self._output = None
        return part


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
