"""Objectives that learn from labelled tokens: cross-entropy, weighted by rewards or by advantages.

Losses are per token, ``(N,)``, to be minimised; every reward is that of the token's row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Largest weight of a row before normalising, as in Peng et al. 2019, section 5.
AWR_CLIP = 20.0


def cross_entropy(logps: Tensor) -> Tensor:
    """``-log pi(a)``. Shape ``(N,)`` to ``(N,)``, nats."""
    return -logps


def reward_weighted(logps: Tensor, base_logps: Tensor, rewards: Tensor, negative_bound: float) -> Tensor:
    """Cross-entropy times reward; what a negative reward can win is softly bounded.

    Let ``d = log pi_0(a) - log pi(a)`` be the surprise bought beyond that of the original model. A positive reward pays
    ``r * -log pi(a)``. Under a negative one that would fall without end as ``d`` grows, so ``d`` counts as

        f(d) = d                           for d <= 0
        f(d) = B (1 - exp(-d / B))         for d > 0,  below B = negative_bound

    which has slope 1 at the original model and dies away as the token becomes unlikely. (Peters & Schaal 2007 weight
    regression by reward; the bound takes the place of their positive transformation.)

    Args:
        logps, base_logps, rewards: ``(N,)``.
        negative_bound: ``B``, nats.

    Shape:
        returns ``(N,)``.
    """
    surprise = base_logps - logps
    bounded = -negative_bound * F.elu(-surprise / negative_bound)
    return rewards * torch.where(rewards < 0, bounded - base_logps, -logps)


def awr_weights(
    rewards: Tensor, groups: Tensor, beta: float, token_counts: Tensor | None = None, clip: float = AWR_CLIP
) -> Tensor:
    """Weights of rows in advantage-weighted regression (Peng et al. 2019, eq. 8): ``exp((r - baseline) / beta)``, clipped.

    The baseline of a row is the mean reward of its group, or of all rows where the row is its group's only one.

    Args:
        rewards: ``(R,)``.
        groups: numbers that rows of one prompt share, ``(R,)``.
        beta: temperature, in units of the reward.
        token_counts: tokens of each row, ``(R,)``: the weights then average 1 over tokens, else over rows.
        clip: largest weight before they are normalised.

    Shape:
        returns ``(R,)``, mean 1.
    """
    advantages = rewards - group_baselines(rewards, groups)
    weights = (advantages / beta).exp().clamp(max=clip)
    counts = torch.ones_like(weights) if token_counts is None else token_counts.to(weights.dtype)
    return weights * counts.sum() / (weights * counts).sum()


def group_baselines(rewards: Tensor, groups: Tensor) -> Tensor:
    """Mean reward of each row's group; the mean of all rows for a row that is alone in its group. Shape ``(R,)``."""
    _, at, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=rewards.dtype).index_add_(0, at, rewards)
    means = torch.where(counts > 1, sums / counts, rewards.mean())
    return means[at]
