"""Functions of tensors as CPU code that the compiler of `torch.compile` writes, called without what `torch.compile` puts around it.

`torch.compile` checks at every call whether what it compiled fits, through some twenty calls of Python: longer than a function of a
few rows takes. Here whoever calls answers for that. What is given later must be of the examples' number formats; sizes may be others,
but equal where the examples' are; and a stride that is a product of an example's sizes must be that product again: where an example is
contiguous, so is what is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count
from math import isqrt
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.model_source import one_line

#: Takes a list of tensors, which it empties, and returns what it computed.
Generated = Callable[[list[Tensor]], Sequence[Tensor]]
#: The compiler is not made for threads.
one_at_a_time = RLock()
_UNCHECKED = {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}


class CompilerFailed(Exception):
    """The compiler does not work here; the cause says why."""


def compiler_failed(name: str, error: BaseException, setting: str = "model.compile") -> TeaError:
    """What to tell whoever asked for the compiler where it fails on what is called ``name``."""
    if isinstance(error, CompilerFailed):
        error = error.__cause__ or error
    return TeaError(
        f"{setting} is true, but torch.compile fails on {name} ({one_line(error, 120)}): install a C++ compiler if there is none, or set "
        f"{setting} to false"
    )


def generate(
    function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor], free: Collection[int] | None = None
) -> Generated | None:
    """The function as compiled code; None if it cannot be: it depends on numbers, or changes what it is given.

    Args:
        function: of tensors, to new tensors.
        examples: what is given, in other sizes; sizes that need not be equal later must differ, and none be 0 or 1 unless it always is.
        free: sizes in the examples that may be others later; None: all. Loops whose length is known are up to twice as fast.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    with one_at_a_time:
        graph = traced(function, examples, free)
        made = None if graph is None else compiled(graph)
    return None if made is None or made.mutated_inputs else made.current_callable


def numbers_unlike(sizes: Collection[int], least: int = 61) -> Iterator[int]:
    """Primes for what is free in examples: no size is one of them or a multiple of it, lest the two be taken for one."""
    for number in count(least):
        is_prime = all(number % divisor for divisor in range(2, isqrt(number) + 1))
        if is_prime and not any(size and size % number == 0 for size in sizes):
            yield number


def traced(
    function: Callable[..., Sequence[Tensor]],
    examples: Sequence[Tensor],
    free: Collection[int] | None = None,
    autograd: bool = False,
) -> torch.fx.GraphModule | None:
    """What a function of tensors does, as a graph of torch's basic operations whose free sizes are symbols; None if numbers decide it.

    Args:
        function, examples, free: as in `generate`.
        autograd: whether the function asks it for gradients.
    """
    from torch._inductor.decomposition import select_decomp_table  # a second or two of imports
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    with torch.inference_mode(False), torch.no_grad():
        own = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype) for e in examples]

        def with_constants(called: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
            def call(*given: Tensor) -> Sequence[Tensor]:
                for example, part in zip(own, given, strict=True):
                    for number, size in zip(example.shape, part.shape, strict=True):
                        if free is not None and number not in free:
                            int(size)  # a symbol that is asked for its number becomes that number
                return called(*given)

            return call

        try:
            if autograd:  # cannot be asked from within what comes below
                function = make_fx(with_constants(function), tracing_mode="symbolic")(*own)
            # The compiler takes nothing that changes in place.
            basic = torch.func.functionalize(with_constants(function))
            graph = make_fx(basic, select_decomp_table(), tracing_mode="symbolic")(*own)
        except Exception:  # whatever the function does with tensors that have no numbers
            return None
    unknown = any(free_unbacked_symbols(node.meta.get("val")) for node in graph.graph.nodes)
    return None if unknown else graph  # numbers would decide sizes


def compiled(graph: torch.fx.GraphModule, many_calls: bool = False) -> Any:
    """The innermost of what the compiler makes of a graph.

    ``many_calls``: the graph is many loops and products; what calls one after the other is C++ as well then.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    try:
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile_fx, config
        from torch._inductor.virtualized import V
        from torch._subclasses.fake_tensor import FakeTensor

        given = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        mode: Any = next(value for value in given if isinstance(value, FakeTensor)).fake_mode
        # With the number of threads what is on disk for another one is not taken.
        options = config.patch({**_UNCHECKED, "cpp.threads": torch.get_num_threads()})
        place = tracing(TracingContext(mode))
        with torch.inference_mode(False), torch.no_grad(), options, V.set_fake_mode(mode), place:
            # A bare module is what the compiler can keep on disk.
            made: Any = compile_fx.compile_fx_inner(
                torch.fx.GraphModule(graph, graph.graph), given, cpp_wrapper=many_calls
            )
        if not hasattr(made, "current_callable"):
            raise RuntimeError(f"torch {torch.__version__} is too old for it")
        return made
    except Exception as error:
        raise CompilerFailed from error
