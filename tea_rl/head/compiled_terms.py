"""`TeaHead.shortlist_terms` and its gradients as compiled code (``train.compile``), for runs of very many minibatches.

An update is a dozen products and some two hundred small operations around them, most of which read and write megabytes. The compiler of
`torch.compile` makes twenty loops of these. Heads of one configuration share the code; their parameters are given to it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tea_rl.generated import CompilerFailed, compiler_failed
from tea_rl.generated_gradient import Differentiable, differentiable
from tea_rl.head.members import MANY_STATES
from tea_rl.head.policy import PolicyTerms, Shortlist

if TYPE_CHECKING:
    from tea_rl.head.layer import TeaHead

_log = logging.getLogger(__name__)
#: By all that decides what the code is; None: cannot be compiled.
_known: dict[Any, Differentiable | None] = {}
_HEAD = "head."


def why_not_compiled(head: TeaHead) -> str | None:
    """What about a head keeps its terms from being compiled; None if nothing does."""
    config = head.config
    if head.weight.device.type != "cpu":
        return f"the head is on {head.weight.device.type}, and only what runs on a CPU is compiled"
    for name in ("dropout", "member_dropout"):
        if getattr(config, name) > 0:
            return f"compiled code would draw other numbers for head.{name}"
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
    """What `TeaHead.shortlist_terms` returns, up to rounding; None where that is not compiled.

    That is for heads that `why_not_compiled` names, for very few tokens (they take another way through the members), under autocast,
    and where nothing or something else than the head is differentiated.

    Raises:
        TeaError: there is no C++ compiler, or one that does not do.
    """
    rows = {"states": states, **shortlist._asdict(), "slots": slots, "within_tail_logps": within_tail_logps}
    fixed = {_HEAD + name: part for name, part in (*head.named_parameters(), *head.named_buffers())}
    if returns is not None:
        (rows if returns.dim() else fixed)["returns"] = returns
    if token_values is not None:
        fixed["token_values"] = token_values
    if why_not_compiled(head) or not _are_served(rows):
        return None
    key = (
        repr(head.config),
        *(head.logit_scale, head.strength, head.members.product_dtype, temperature, anchor),
        *(torch.get_num_threads(), torch.get_default_dtype()),
        *((name, part.shape[1:], part.dtype) for name, part in rows.items()),
        *((name, part.shape, part.stride(), part.dtype, part.requires_grad) for name, part in fixed.items()),
    )
    if key not in _known:
        terms = _Terms(head, [*rows, *fixed], temperature, anchor)
        try:
            _known[key] = differentiable(
                terms.results, terms.count, list(rows.values()), list(fixed.values())
            )
        except CompilerFailed as error:
            name = head.base_model_name_or_path or "this head"
            raise compiler_failed(name, error, "train.compile") from error
        if _known[key] is None:
            _log.warning(
                "train.compile compiles at most the products with shortlists here: what this head computes cannot be written down"
            )
    known = _known[key]
    if known is None:
        return None
    logps, kl, spread, *more = known(*(part.contiguous() for part in rows.values()), *fixed.values())
    value = None if token_values is None else more.pop()
    return PolicyTerms(logps, more.pop() if more else kl, kl, spread, value)


def _are_served(rows: dict[str, Tensor]) -> bool:
    """Whether the code is right for such rows: it checks no sizes itself."""
    count = len(rows["states"])
    fit = all(len(part) == count and not part.requires_grad for part in rows.values())
    return fit and count >= MANY_STATES and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class _Terms(nn.Module):
    """The function that is compiled: of what is called ``names``, rows and then the head's numbers."""

    def __init__(self, head: TeaHead, names: Sequence[str], temperature: float, anchor: str) -> None:
        super().__init__()
        self.names, self.temperature, self.anchor = names, temperature, anchor
        # A head of its own, with the same tensors: they are exchanged while somebody else may use the other.
        shared = {id(part): part for part in (*head.parameters(), *head.buffers(), head._fast_product)}
        self.head = copy.deepcopy(head, shared)
        self.head.writes_products = True

    @property
    def count(self) -> int:
        """How many results there are: where the anchor is the KL, they are one."""
        return 3 + (self.anchor != "reverse_kl") + ("token_values" in self.names)

    def results(self, *given: Tensor) -> list[Tensor]:
        """The terms of what is given, each once."""
        values = dict(zip(self.names, given, strict=True))
        state = {name: part for name, part in values.items() if name.startswith(_HEAD)}
        found = torch.func.functional_call(self, state, (values,))
        kept = [found.logps, found.kl, found.entropy]
        kept += [found.anchor] if self.anchor != "reverse_kl" else []
        return kept if found.value is None else [*kept, found.value]

    def forward(self, values: dict[str, Tensor]) -> PolicyTerms:
        """`TeaHead.shortlist_terms`, its products as basic operations."""
        shortlist = Shortlist(*(values[name] for name in Shortlist._fields))
        return self.head.shortlist_terms(
            values["states"],
            shortlist,
            values["slots"],
            values["within_tail_logps"],
            self.temperature,
            self.anchor,
            None,
            values.get("returns"),
            values.get("token_values"),
        )
