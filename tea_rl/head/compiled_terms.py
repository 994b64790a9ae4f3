"""`TeaHead.shortlist_terms` and its gradients as compiled code (``train.compile``), for runs of very many minibatches.

An update is a dozen products and some two hundred small operations around them, most of which read and write megabytes. The compiler of
`torch.compile` makes twenty loops of these. Heads of one configuration share the code; their parameters are given to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tea_rl.generated import CompilerFailed, compiler_failed
from tea_rl.generated_gradient import Differentiable, differentiable
from tea_rl.head.policy import PolicyTerms, Shortlist

if TYPE_CHECKING:
    from tea_rl.head.layer import TeaHead

#: The code is one for all numbers of tokens from here on; fewer take another way through the members.
_FEWEST_TOKENS = 8
_SHORTLIST = len(Shortlist._fields)
#: By all that decides what the code is; None: cannot be compiled.
_known: dict[Any, Differentiable | None] = {}


def why_not_compiled(head: TeaHead) -> str | None:
    """What about a head keeps its terms from being compiled; None if nothing does."""
    config = head.config
    if head.weight.device.type != "cpu":
        return f"the head is on {head.weight.device.type}, and only what runs on a CPU is compiled"
    if config.dropout > 0 or config.member_dropout > 0:
        return "compiled code would draw other numbers for head.dropout and head.member_dropout"
    if head.full_vocabulary:
        return (
            f'only updates over shortlists are compiled, and head.shortlist_size is "{config.shortlist_size}"'
        )
    if config.readout == "vocab" or head.reference_delta is not None:
        return "the head trains a matrix of the vocabulary's size (head.readout vocab, head.train_reference)"
    return None


def compiled_terms(
    head: TeaHead,
    states: Tensor,
    shortlist: Shortlist,
    slots: Tensor,
    within_tail_logps: Tensor,
    temperature: float,
    anchor: str,
    returns: Tensor | None,
    token_values: Tensor | None,
) -> PolicyTerms | None:
    """What `TeaHead.shortlist_terms` returns, up to rounding; None where that is not compiled: for heads that `why_not_compiled` names,
    for very few tokens, and where nothing is differentiated.

    Raises:
        TeaError: there is no C++ compiler, or one that does not do.
    """
    if len(states) < _FEWEST_TOKENS or not torch.is_grad_enabled() or why_not_compiled(head):
        return None
    rows = [states, *shortlist, slots, within_tail_logps]
    state = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    fixed = list(state.values())
    if returns is not None:
        (rows if returns.dim() else fixed).append(returns)
    if token_values is not None:
        fixed.append(token_values)
    terms = _Terms(
        head, list(state), temperature, anchor, len(rows), returns is not None, token_values is not None
    )
    key = (
        repr(head.config),
        *(
            head.logit_scale,
            head.strength,
            head.members.product_dtype,
            temperature,
            anchor,
            torch.get_num_threads(),
        ),
        *((part.shape[1:], part.dtype) for part in rows),
        *((part.shape, part.stride(), part.dtype, part.requires_grad) for part in fixed),
        *(len(rows), returns is not None, token_values is not None),
    )
    if key not in _known:
        try:
            _known[key] = differentiable(terms.results, terms.count, rows, fixed)
        except CompilerFailed as error:
            name = head.base_model_name_or_path or "this head"
            raise compiler_failed(name, error, "train.compile") from error
    known = _known[key]
    return None if known is None else terms.of(known(*(part.contiguous() for part in rows), *fixed))


class _Terms(nn.Module):
    """The function that is compiled: of rows, then of the head's numbers."""

    def __init__(
        self,
        head: TeaHead,
        names: list[str],
        temperature: float,
        anchor: str,
        num_rows: int,
        with_returns: bool,
        with_values: bool,
    ) -> None:
        super().__init__()
        self.head, self.names = head, [f"head.{name}" for name in names]
        self.temperature, self.anchor = temperature, anchor
        self.num_rows, self.with_returns, self.with_values = num_rows, with_returns, with_values

    @property
    def count(self) -> int:
        """How many results there are: where the anchor is the KL, they are one."""
        return 3 + (self.anchor != "reverse_kl") + self.with_values

    def results(self, *given: Tensor) -> Sequence[Tensor]:
        """The terms of what is given, each once."""
        rows, fixed = list(given[: self.num_rows]), list(given[self.num_rows :])
        token_values = fixed.pop() if self.with_values else None
        returns = (rows if self.num_rows > _SHORTLIST + 3 else fixed).pop() if self.with_returns else None
        state = dict(zip(self.names, fixed, strict=True))
        found = torch.func.functional_call(self, state, (*rows, returns, token_values))
        kept = [found.logps, found.kl, found.entropy]
        kept += [found.anchor] if self.anchor != "reverse_kl" else []
        return [*kept, found.value] if self.with_values else kept

    def of(self, results: Sequence[Tensor]) -> PolicyTerms:
        """The terms again."""
        logps, kl, spread, *more = results
        value = more.pop() if self.with_values else None
        return PolicyTerms(logps, more.pop() if more else kl, kl, spread, value)

    def forward(self, states: Tensor, *given: Any) -> PolicyTerms:
        """`TeaHead.shortlist_terms`, its products as basic operations."""
        shortlist, (slots, within, returns, values) = Shortlist(*given[:_SHORTLIST]), given[_SHORTLIST:]
        self.head.writes_products = True
        try:
            return self.head.shortlist_terms(
                states, shortlist, slots, within, self.temperature, self.anchor, None, returns, values
            )
        finally:
            self.head.writes_products = False
