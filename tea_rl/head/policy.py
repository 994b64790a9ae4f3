"""The full-support policy on a shortlist and one tail scalar, exact at O(k) a token (DESIGN section 3).

A position is described by its *slots*: the ``k`` shortlist tokens and, last, the whole tail as one slot. Inside the tail
the proportions never change, so every quantity of the full distribution is a quantity of the slots plus a constant:

    log pi(a)      = slot_logps[slot of a] + (l_a - tau if a is in the tail else 0)
    KL(pi || pi_0) = sum over slots of p (log p - log p_0)
    H(pi)          = H(slots) + p_tail * H(tail),   H(tail) = tau - E_tail[l]

Shape letters: ``N`` tokens, ``V`` vocabulary, ``k`` shortlist, ``C`` slots (``k + 1``, or ``V`` without a tail).
All logits here are already divided by the sampling temperature: the policy is defined at that temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tea_rl.generated import Generated, generate, numbers_unlike
from tea_rl.head.scratch import Scratch

#: Stands for minus infinity where a later product with a zero probability must stay zero.
MASKED = -1e30
#: Rows gathered at a time; larger blocks fall out of the processor's cache.
_GATHER_ROWS = 64
#: Numbers of which only the largest is looked at first, see `largest`.
_BUNDLE = 8


class PolicyTerms(NamedTuple):
    """Per-token quantities of the policy at ``N`` positions, each ``(N,)`` float32, in nats.

    ``value`` is the expected value of the next token, where values of tokens were given; it has their unit.
    """

    logps: Tensor
    anchor: Tensor
    kl: Tensor
    entropy: Tensor
    value: Tensor | None = None

    def select(self, index: Tensor | slice) -> PolicyTerms:
        """The same of some positions."""
        return PolicyTerms(*(None if term is None else term[index] for term in self))  # type: ignore[arg-type]


class Shortlist(NamedTuple):
    """What is kept of the reference logits at ``N`` positions.

    Shape:
        ids ``(N, k)`` int64; logits ``(N, k)``; tail_logsumexp ``(N,)`` (``tau``); tail_entropy ``(N,)`` in nats.
    """

    ids: Tensor
    logits: Tensor
    tail_logsumexp: Tensor
    tail_entropy: Tensor

    def slot_logits(self) -> Tensor:
        """Reference logits of all slots, ``(N, k + 1)``."""
        return torch.cat([self.logits, self.tail_logsumexp.unsqueeze(1)], dim=1)


def build_shortlist(logits: Tensor, size: int, scratch: Scratch | None = None) -> tuple[Shortlist, Tensor]:
    """Split reference logits into a shortlist and its tail, in three passes over the vocabulary: the largest, the softmax, the mean.

    Args:
        logits: ``(N, V)`` float32 reference logits at the policy's temperature. **Overwritten.**
        size: ``k``, smaller than ``V``.
        scratch: where the tail's distribution is put; None: into new memory.

    Returns:
        the shortlist, and the tail's own distribution ``(N, V)`` (zero on the shortlist), to sample a tail token from.
    """
    # One more than is listed: the tail begins with its likeliest token, which nobody need look for again.
    top, ids = largest(logits, size + 1)
    (top, tail_max), (ids, likeliest) = ((part[:, :size].contiguous(), part[:, size:]) for part in (top, ids))
    logits.scatter_(1, ids, MASKED)
    out = None if scratch is None else scratch.take("tail", logits.shape, logits.dtype, logits.device)
    tail_probs = torch.softmax(logits, dim=-1, out=out)
    # tau = max - log p(max): the softmax already holds the sum, a separate logsumexp would be another pass.
    tau = (tail_max - tail_probs.gather(1, likeliest).log()).squeeze(1)
    tail_mean = logits.mul_(tail_probs).sum(dim=-1)
    return Shortlist(ids, top, tau, tau - tail_mean), tail_probs


def largest(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(size)``, in three quarters to half of its time where rows are many: only bundles whose best token is among the best.

    Shape:
        logits ``(N, V)``; returns ``(N, size)`` twice, values in falling order and their columns.
    """
    rows, vocabulary = logits.shape
    bundles = vocabulary // _BUNDLE
    if bundles <= size:
        return logits.topk(size, dim=-1)
    bundled = bundles * _BUNDLE
    # A bundle's tokens stand far apart, so that the maximum runs along whole rows. The best bundles are found in the same way.
    best = largest(logits[:, :bundled].view(rows, _BUNDLE, bundles).amax(dim=1), size)[1]
    members = torch.arange(0, bundled, bundles, device=logits.device).view(1, _BUNDLE, 1)
    left = torch.arange(bundled, vocabulary, device=logits.device).expand(rows, -1)
    columns = torch.cat([(best.unsqueeze(1) + members).flatten(1), left], dim=1)
    top, at = logits.gather(1, columns).topk(size, dim=-1)
    return top, columns.gather(1, at)


def sample_slots(slot_logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling, one uniform a row.

    Shape:
        slot_logits ``(N, C)``; uniforms ``(N,)`` in [0, 1); returns ``(N,)`` int64 slots.
    """
    return sample_columns(torch.softmax(slot_logits.to(_exact(slot_logits)), dim=-1), uniforms)


def sample_columns(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The same from weights that need not sum to 1, ``(N, C)``."""
    cdf = weights.cumsum(dim=-1, dtype=_exact(weights))
    total = cdf[:, -1:].contiguous()
    slots = torch.searchsorted(cdf, uniforms.to(cdf.dtype).unsqueeze(1) * total, right=True)
    # A product that rounds up to the total itself belongs to the last slot with any probability.
    return torch.minimum(slots, torch.searchsorted(cdf, total)).squeeze(1)


def _exact(numbers: Tensor) -> torch.dtype:
    """Format of running sums: one of float32 over a whole vocabulary is off by more than the rarest tokens weigh."""
    return torch.float64 if numbers.device.type != "mps" else torch.float32  # MPS has nothing finer


def action_logps(slot_logps: Tensor, slots: Tensor, within_tail_logps: Tensor) -> Tensor:
    """Log-probability of the actions, ``(N,)``. ``within_tail_logps`` is ``l_a - tau`` in the tail, 0 elsewhere."""
    return slot_logps.gather(1, slots.unsqueeze(1)).squeeze(1) + within_tail_logps


def entropy(slot_logps: Tensor, tail_entropy: Tensor | None) -> Tensor:
    """Entropy of the full distribution in nats, ``(N,)``; ``tail_entropy`` None: there is no tail."""
    own = -(slot_logps.exp() * slot_logps).sum(dim=-1)
    return own if tail_entropy is None else own + slot_logps[:, -1].exp() * tail_entropy


def expected_value(slot_logps: Tensor, values: Tensor) -> Tensor:
    """Expectation under the policy of what the shortlist's tokens are worth; the tail counts as worth 0.

    Shape:
        slot_logps ``(N, k + 1)``; values ``(N, k)``; returns ``(N,)``.
    """
    return torch.linalg.vecdot(slot_logps[:, :-1].exp(), values)


class _ShortlistProduct(torch.autograd.Function):
    """``out[n, j] = weight[ids[n, j]] . g[n]``, the rows read where they lie wherever torch can do so.

    Gathered rows would be written and read again: three times the traffic of what this is bound by. The forward pass gathers them
    on GPUs all the same, the backward pass on MPS; the rows of all tokens are never held at once.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, ids: Tensor, compiled: Generated | None) -> Tensor:
        ctx.save_for_backward(g, weight, ids)
        if compiled is not None:
            return compiled([g.float().contiguous(), weight, ids.long().contiguous()])[0]
        in_place = _reads_in_place(weight.device.type, weight.dtype)
        return (_product_in_place if in_place else _gathered_product)(g, weight, ids)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN001
        g, weight, ids = ctx.saved_tensors
        own = grad_out.to(weight.dtype)
        grad_g = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_g = _weighted_rows(own, weight, ids).to(g.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for start in range(0, ids.shape[0], _GATHER_ROWS):
                block = slice(start, start + _GATHER_ROWS)
                outer = own[block].unsqueeze(2) * g[block].to(weight.dtype).unsqueeze(1)
                grad_weight.index_add_(0, ids[block].flatten(), outer.flatten(0, 1))
        return grad_g, grad_weight, None, None


def _weighted_rows(amounts: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``sum_j amounts[n, j] weight[ids[n, j]]``, ``(N, G)``."""
    if weight.device.type == "mps":  # has no embedding_bag in every torch that is supported
        blocks = zip(amounts.split(_GATHER_ROWS), ids.split(_GATHER_ROWS), strict=True)
        return torch.cat([torch.bmm(a.unsqueeze(1), F.embedding(i, weight)).squeeze(1) for a, i in blocks])
    starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
    return F.embedding_bag(ids.flatten(), weight, starts, mode="sum", per_sample_weights=amounts.flatten())


@cache
def _reads_in_place(device: str, dtype: torch.dtype) -> bool:
    """Whether `_product_in_place` serves such weights. Some versions of torch sum in half precision there, too."""
    if device != "cpu":
        return False  # untested
    ones, ids = torch.ones(1, 1024, dtype=dtype), torch.zeros(1, 1, dtype=torch.long)
    return _product_in_place(ones, ones, ids).item() == 1024


def _product_in_place(g: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``weight[ids[n, j]] . g[n]``, ``(N, k)`` float32: what the gradient of an embedding bag's weights is, without the bag."""
    rows, size = ids.shape
    starts = torch.arange(0, ids.numel(), size)
    row = torch.arange(rows).repeat_interleave(size)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.to(weight.dtype), weight, ids.flatten(), starts, row, mode=0
    )
    return products.view(rows, size).float()


def _gathered_product(g: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The same by gathering rows, some at a time, ``(N, k)`` float32."""
    out = torch.empty(ids.shape, dtype=torch.float32, device=g.device)
    for start in range(0, g.shape[0], _GATHER_ROWS):
        block = slice(start, start + _GATHER_ROWS)
        rows = F.embedding(ids[block], weight)
        out[block] = torch.bmm(rows, g[block].to(rows.dtype).unsqueeze(2)).squeeze(2)
    return out


def shortlist_product(g: Tensor, weight: Tensor, ids: Tensor, compiled: Generated | None = None) -> Tensor:
    """Read a correction through chosen rows of a vocabulary projection (the reference head, or a trained one).

    ``compiled`` is `compiled_product` of such weights: twice as fast as torch's kernel for half precision, which reads one number at a
    time, and sums in float32.

    Shape:
        g ``(N, G)``; weight ``(V, G)``; ids ``(N, k)``; returns ``(N, k)`` float32.
    """
    return _ShortlistProduct.apply(g, weight, ids, compiled)


def written_product(given: Sequence[Tensor]) -> Sequence[Tensor]:
    """`shortlist_product` of ``(g, weight, ids)`` in basic operations, for a compiler; run as it is, it holds the rows of all tokens."""
    g, weight, ids = given
    return ((weight[ids].float() * g.unsqueeze(1)).sum(dim=-1),)


@cache
def compiled_product(dtype: torch.dtype, vocabulary: int, width: int, listed: int) -> Generated | None:
    """`shortlist_product` without gradients, as compiled code for a CPU: contiguous float32 ``g``, weights of a number format, int64 ids.

    ``(V, G)`` is the shape of the weights and ``k`` how many rows are listed; the number of tokens is free.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    weight = torch.empty(vocabulary, width, dtype=dtype)
    rows = next(numbers_unlike([vocabulary, width, listed]))
    examples = (torch.empty(rows, width), weight, torch.zeros(rows, listed, dtype=torch.long))
    made = generate(lambda *given: written_product(given), examples, [rows])
    return None if made is None else lambda given: made(given)  # a plain function: heads are copied
