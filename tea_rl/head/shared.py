"""Corrections of many heads at once: the rows of the reference weight are gathered once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tea_rl.head.layer import TeaHead

#: Rows gathered at a time; larger blocks fall out of the processor's cache.
_GATHER_ROWS = 64


class _SharedProduct(torch.autograd.Function):
    """``out[n, h, j] = weight[ids[n, j]] . g[n, h]``; the gathered rows are not kept but gathered again backward."""

    @staticmethod
    def forward(ctx, g: Tensor, weight: Tensor, ids: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(weight, ids)
        shape = (ids.shape[0], g.shape[1], ids.shape[1])
        out = torch.empty(shape, dtype=torch.float32, device=g.device)
        for start in range(0, g.shape[0], _GATHER_ROWS):
            block = slice(start, start + _GATHER_ROWS)
            rows = F.embedding(ids[block], weight)
            out[block] = torch.bmm(g[block].to(rows.dtype), rows.transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        weight, ids = ctx.saved_tensors
        shape = (ids.shape[0], grad_out.shape[1], weight.shape[1])
        grad_g = torch.empty(shape, dtype=torch.float32, device=grad_out.device)
        for start in range(0, ids.shape[0], _GATHER_ROWS):
            block = slice(start, start + _GATHER_ROWS)
            rows = F.embedding(ids[block], weight)
            grad_g[block] = torch.bmm(grad_out[block].to(rows.dtype), rows).float()
        return grad_g, None, None


def shares_product(head: TeaHead) -> bool:
    """Whether the head's correction is read through the frozen reference weight on a shortlist, and by nothing else."""
    return not head.full_vocabulary and head.config.readout == "tied" and head.reference_delta is None


def shared_corrections(
    heads: Sequence[TeaHead], states: Tensor, ids: Tensor, returns: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """`TeaHead.shortlist_correction` of several heads over the same states and shortlists.

    Heads that read their correction through one and the same frozen weight share its gathered rows, forward and backward; the
    others compute their own product. Desired returns are for the heads with ``return_conditioning``. The gradients of the heads do not mix, even where one of them is not finite.

    Shape:
        states ``(N, W)``, ids ``(N, k)``, desired returns ``()`` or ``(N,)``; returns, for each head, ``(N, k)`` and ``(N,)``.
    """
    asked = [returns if head.config.return_conditioning else None for head in heads]
    together = [head for head in heads if shares_product(head) and head.weight is heads[0].weight]
    if len(together) < 2:
        return [head.shortlist_correction(states, ids, own) for head, own in zip(heads, asked, strict=True)]
    read = {
        id(head): head.read_members(states, own)
        for head, own in zip(heads, asked, strict=True)
        if head in together
    }
    products = _SharedProduct.apply(
        torch.stack([g for g, _ in read.values()], dim=1), heads[0].weight, ids
    ).unbind(dim=1)
    place = {key: number for number, key in enumerate(read)}
    return [
        (head.logit_scale * products[place[id(head)]], read[id(head)][1])
        if id(head) in read
        else head.shortlist_correction(states, ids, own)
        for head, own in zip(heads, asked, strict=True)
    ]
