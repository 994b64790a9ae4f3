"""A function of rows and parameters together with its gradients, both as code of `tea_rl.generated`.

Operations and gradients are written down once, by letting autograd run on tensors without numbers. What the results need becomes one
compiled function and the rest another; a single node of autograd calls them. Sizes of parameters are constants of the code, the number
of rows is a symbol: small loops whose length the compiler knows are twice as fast as others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tea_rl.generated import Generated, compiled, numbers_unlike, one_at_a_time, traced

#: The least number of rows of the examples: more than units of a member, as in most updates.
_MANY = 1021


class Differentiable:
    """A function as compiled code with gradients, made by `differentiable`.

    Args:
        split: calls of two modules, the results' and the gradients'; its inputs are the cotangents of the results, then what the
            function is given.
        num_results: how many results the function has.
        learned: places of what has gradients among what the function is given.
        forward, backward: the two, compiled.
    """

    def __init__(
        self,
        split: torch.fx.GraphModule,
        num_results: int,
        learned: Sequence[int],
        forward: Generated,
        backward: Generated,
    ) -> None:
        names = [node.name for node in split.graph.nodes if node.op == "placeholder"]
        self.cotangents, self.given = names[:num_results], names[num_results:]
        self.num_results, self.learned = num_results, learned
        self.forward, self.backward = forward, backward
        self.reads: list[list[str]] = []
        #: Names of what each of the two returns.
        self.writes: list[list[str]] = []
        for call in (node for node in split.graph.nodes if node.op == "call_module"):
            self.reads.append([str(read) for read in call.args])
            places = {user.args[1]: user.name for user in call.users if user.target is operator.getitem}
            self.writes.append([places[place] for place in range(len(places))] or [call.name])
        self.wanted = [node.name for node in _outputs(split)]
        known = {*self.cotangents, *self.writes[1]}
        self.kept = [name for name in self.reads[1] if name not in known]

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The results, with gradients for what learns.

        Nothing is checked: rows are contiguous and equally many, and all is of the formats and sizes that the code was made for.
        """
        return _Call.apply(self, *given)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Differentiable, *given: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(function.given, given, strict=True))
        returned = function.forward([values[name] for name in function.reads[0]])
        values |= zip(function.writes[0], returned, strict=True)
        kept = {name: values[name] for name in function.kept}
        tensors = [value for value in kept.values() if isinstance(value, Tensor)]
        # What is given as well: then autograd notices what is changed before the gradients are asked for.
        ctx.save_for_backward(*tensors, *given)
        ctx.numbers = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
        ctx.function = function
        return tuple(values[name] for name in function.wanted[: function.num_results])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        function: Differentiable = ctx.function
        values: dict[str, Any] = dict(ctx.numbers)
        values |= zip((name for name in function.kept if name not in values), ctx.saved_tensors, strict=False)
        values |= zip(function.cotangents, (part.contiguous() for part in cotangents), strict=True)
        returned = function.backward([values[name] for name in function.reads[1]])
        values |= zip(function.writes[1], returned, strict=True)
        gradients: list[Tensor | None] = [None] * len(function.given)
        for place, name in zip(function.learned, function.wanted[function.num_results :], strict=True):
            gradients[place] = values[name]
        return None, *gradients


def differentiable(
    function: Callable[..., Sequence[Tensor]],
    num_results: int,
    rows: Sequence[Tensor],
    fixed: Sequence[Tensor],
) -> Differentiable | None:
    """The function with its gradients as compiled code; None if it cannot be: numbers or the number of rows decide what it does.

    Args:
        function: of ``(*rows, *fixed)``, to so many times float32 numbers ``(N,)``. It draws nothing at random. Nothing asks for
            autocast around it, or around what is made of it.
        rows: examples of what has a first axis ``N``.
        fixed: what else is given, with the sizes that it always has; what requires a gradient gets one.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    sizes = [size for part in (*(row[0] for row in rows), *fixed) for size in part.shape]
    number = next(numbers_unlike(sizes, _MANY))
    given = [torch.empty(number, *part.shape[1:], dtype=part.dtype) for part in rows] + [*fixed]
    learned = [place for place, part in enumerate(given) if part.requires_grad]
    used: list[int] = []

    def both(*given: Tensor) -> Sequence[Tensor]:
        cotangents, given = given[:num_results], given[num_results:]
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_(place in learned) for place, part in enumerate(given)]
            results = function(*leaves)
        if any(result.dtype != torch.float32 for result in results):
            raise TypeError("what is differentiated is float32")
        found = torch.autograd.grad(
            results, [leaves[place] for place in learned], cotangents, allow_unused=True
        )
        used[:] = [place for place, gradient in zip(learned, found, strict=True) if gradient is not None]
        return [
            *(result.detach() for result in results),
            *(gradient for gradient in found if gradient is not None),
        ]

    with one_at_a_time:
        cotangents = [torch.empty(number, dtype=torch.float32) for _ in range(num_results)]
        graph = traced(both, [*cotangents, *given], [number], autograd=True)
        if graph is None or _knows_rows(graph):
            return None
        split = _split(graph, num_results)
        forward, backward = (
            compiled(cast("torch.fx.GraphModule", half), many_calls=True).current_callable
            for half in split.children()
        )
        return Differentiable(split, num_results, used, forward, backward)


def _outputs(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(cast("list[torch.fx.Node]", graph.graph.output_node().args[0]))


def _knows_rows(graph: torch.fx.GraphModule) -> bool:
    """Whether the number of rows has become a constant."""
    inputs = (node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder")
    count = next(iter(inputs)).shape[0]
    return not isinstance(count, torch.SymInt) or count.node.maybe_as_int() is not None


def _split(graph: torch.fx.GraphModule, num_results: int) -> torch.fx.GraphModule:
    """The graph as calls of two modules: what results need, and the rest."""
    from torch.fx.passes.split_module import split_module

    needed: set[torch.fx.Node] = set()
    left = _outputs(graph)[:num_results]
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    split = split_module(graph, None, lambda node: int(node not in needed))  # type: ignore[arg-type]
    for part in cast("Iterable[torch.fx.GraphModule]", split.children()):
        output = part.graph.output_node()
        if isinstance(output.args[0], torch.fx.Node):  # the compiler wants several
            output.args = ((output.args[0],),)
            part.recompile()
    return split
