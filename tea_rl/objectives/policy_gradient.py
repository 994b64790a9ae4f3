"""The clipped policy-gradient surrogate and the trust region's distance."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logps: Tensor,
    behaviour_logps: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """PPO's clipped loss per token (Schulman et al. 2017, eq. 7), to be minimised.

    On data of the current policy the ratio is 1 and the gradient is REINFORCE's.

    Shape:
        all ``(N,)``; returns ``(N,)``.
    """
    ratio = (logps - behaviour_logps).exp()
    high = clip_range if clip_range_high is None else clip_range_high
    return -torch.min(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + high) * advantages)


def behaviour_kl(logps: Tensor, behaviour_logps: Tensor) -> Tensor:
    """Estimate of ``KL(behaviour || policy)`` from the behaviour's own samples: ``mean(r - 1 - log r)`` in nats.

    Never negative and of low variance (Schulman 2020, "Approximating KL divergence", estimator k3). Shape ``(N,)`` to ``()``.
    """
    log_ratio = logps - behaviour_logps
    return (log_ratio.exp() - 1.0 - log_ratio).mean()
