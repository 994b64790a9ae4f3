"""The conservativity anchor: how far the policy has moved from the original model."""

from __future__ import annotations

from torch import Tensor


def divergence(name: str, logits: Tensor, base_logits: Tensor, logps: Tensor, base_logps: Tensor) -> Tensor:
    """Distance between policy and original model at ``N`` positions.

    * ``reverse_kl``: exact ``KL(pi || pi_0)`` over all slots (DESIGN section 3).
    * ``forward_kl``: exact ``KL(pi_0 || pi)``.
    * ``logit_l1``: ``mean |z - l| / (std(l) + 1)`` of the original TEA, over the slots (a tail counts as one slot).

    Shape:
        all inputs ``(N, C)``; returns ``(N,)``, nats for the two KLs.

    Raises:
        ValueError: for another name.
    """
    if name == "reverse_kl":
        return (logps.exp() * (logps - base_logps)).sum(dim=-1)
    if name == "forward_kl":
        return (base_logps.exp() * (base_logps - logps)).sum(dim=-1)
    if name == "logit_l1":
        return (logits - base_logits).abs().mean(dim=-1) / (base_logits.std(dim=-1) + 1.0)
    raise ValueError(f"unknown divergence {name!r}; expected reverse_kl, forward_kl or logit_l1")


def anchored_loss(task: Tensor, anchor: Tensor, conservativity: float) -> Tensor:
    """``(task + c * anchor) / (1 + c)`` (DESIGN section 5)."""
    return (task + conservativity * anchor) / (1.0 + conservativity)


def with_entropy(task: Tensor, entropy: Tensor, coef: float) -> Tensor:
    """``task - coef * mean(entropy)``: a bonus for variety (Mnih et al. 2016, section 4), or where ``coef`` is negative its price.

    With the reverse KL anchor, ``c KL - coef H = (c + coef) KL - coef E[-log pi_0]``: a negative ``coef`` is an anchor that
    minds less that the policy is surer than the original model, and more that it says what that model would not.

    Shape:
        task ``()``; entropy ``(N,)`` in nats; returns ``()``.
    """
    return task if coef == 0 else task - coef * entropy.mean()
