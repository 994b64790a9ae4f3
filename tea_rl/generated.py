"""Functions of tensors as CPU code that the compiler of `torch.compile` writes, called without what `torch.compile` puts around it.

`torch.compile` checks at every call whether what it compiled fits, through some twenty calls of Python: longer than a function of a
few rows takes. Here whoever calls answers for that. What is given later must be of the examples' number formats; sizes may be others,
but equal where the examples' are; and a stride that is a product of an example's sizes must be that product again: where an example is
contiguous, so is what is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.model_source import one_line

#: Takes a list of tensors, which it empties, and returns what it computed.
Generated = Callable[[list[Tensor]], Sequence[Tensor]]
#: The compiler is not made for threads.
_one_at_a_time = RLock()
_UNCHECKED = {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}


class CompilerFailed(Exception):
    """The compiler does not work here; the cause says why."""


def compiler_failed(name: str, error: BaseException) -> TeaError:
    """What to tell whoever asked for ``model.compile`` where it fails; ``name`` of the model."""
    if isinstance(error, CompilerFailed):
        error = error.__cause__ or error
    return TeaError(
        f"model.compile is true, but torch.compile fails on {name} ({one_line(error, 120)}): install a C++ compiler if there is none, or "
        "set model.compile to false"
    )


def generate(function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> Generated | None:
    """The function as compiled code; None if it cannot be: it depends on numbers, or changes what it is given.

    Args:
        function: of tensors, to new tensors.
        examples: what is given, in other sizes; sizes that need not be equal later must differ, and none be 0 or 1 unless it always is.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # half a second of imports
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    with _one_at_a_time, torch.inference_mode(False), torch.no_grad():
        own = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype) for e in examples]
        try:
            graph = make_fx(lambda *given: function(*given), tracing_mode="symbolic")(*own)
        except Exception:  # whatever the function does with tensors that have no numbers
            return None
        if any(free_unbacked_symbols(node.meta.get("val")) for node in graph.graph.nodes):
            return None  # numbers decide sizes
        try:
            made = _compiled(graph, own)
        except Exception as error:
            raise CompilerFailed from error
    return None if made.mutated_inputs else made.current_callable


def _compiled(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
    """The innermost of what the compiler makes of a graph."""
    from torch._inductor.compile_fx import compile_fx_inner  # a second or two of imports

    if not hasattr(torch._inductor, "standalone_compile"):
        raise RuntimeError(f"torch {torch.__version__} is too old for it")
    made: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(compile_fx_inner(*args, **kwargs))
        return made[-1]

    options = {"inner_compile": keep, "config_patches": _UNCHECKED}
    with torch._functorch.config.patch(enable_autograd_cache=False):  # would not ask `keep`
        torch._inductor.standalone_compile(graph, [*examples], dynamic_shapes="from_graph", options=options)
    return made[0]
