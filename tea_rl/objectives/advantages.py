"""Advantages of sampled completions from their rewards; ``P`` prompts with ``G`` generations each."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-4


def reinforce_advantages(rewards: Tensor) -> Tensor:
    """Reward minus the batch mean (REINFORCE with a constant baseline). Shape ``(P, G)`` to ``(P, G)``."""
    return rewards - rewards.mean()


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Reward minus the mean of the *other* generations of its prompt (RLOO, Ahmadian et al. 2024, eq. 5).

    Shape ``(P, G)`` to ``(P, G)``, ``G >= 2``.
    """
    num_generations = rewards.shape[1]
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (num_generations - 1)
    return rewards - others


def grpo_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """Reward minus its group's mean, over a standard deviation (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        rewards: ``(P, G)``, ``G >= 2``.
        scale: whose standard deviation divides: ``group``, ``batch`` or ``none``.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        return centred / (rewards.std(dim=1, keepdim=True) + _EPS)
    if scale == "batch":
        return centred / (rewards.std() + _EPS)
    return centred


def ppo_advantages(rewards: Tensor) -> Tensor:
    """Rewards whitened over the batch, PPO's advantage without a value head. Shape ``(P, G)`` to ``(P, G)``."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + _EPS) if rewards.numel() > 1 else centred


def advantages(name: str, rewards: Tensor, scale: str = "group") -> Tensor:
    """Advantages of an objective by its recipe name, ``(P, G)``.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "grpo":
        return grpo_advantages(rewards, scale)
    simple = {"reinforce": reinforce_advantages, "rloo": rloo_advantages, "ppo": ppo_advantages}
    if name not in simple:
        raise ValueError(f"unknown objective {name!r}; expected grpo, rloo, reinforce or ppo")
    return simple[name](torch.as_tensor(rewards))


def known_advantages(name: str, rewards: Tensor, scale: str = "group") -> tuple[Tensor, Tensor]:
    """The same where some rewards are NaN: such completions have no advantage, and groups of them alone count for nothing.

    One that is unknown beside known ones counts as their mean.

    Returns:
        the advantages, ``(P, G)``; and which groups hold different known rewards, ``(P,)`` bool.
    """
    unknown = rewards.isnan()
    some = ~unknown.all(dim=1)
    result = torch.zeros_like(rewards)
    if bool(some.any()):
        means = rewards[some].nanmean(dim=1, keepdim=True)
        result[some] = advantages(name, torch.where(unknown[some], means, rewards[some]), scale)
    highest, lowest = rewards.masked_fill(unknown, -torch.inf), rewards.masked_fill(unknown, torch.inf)
    return result.masked_fill(unknown, 0.0), highest.amax(dim=1) > lowest.amin(dim=1)


def reward_unit(name: str, rewards: Tensor, scale: str = "group") -> float:
    """How much reward an advantage of 1 stands for, on the average: credit of other origin, divided by it, is an advantage, too.

    Args:
        name, scale: as in `advantages`.
        rewards: ``(P, G)``, NaN where unknown.

    Returns:
        1 where rewards are not scaled; 0 where all known ones are equal that are compared.
    """
    if name in ("rloo", "reinforce") or (name == "grpo" and scale == "none"):
        return 1.0
    groups = rewards if name == "grpo" and scale == "group" else rewards.flatten().unsqueeze(0)
    known = [group[~group.isnan()] for group in groups]
    # Equal rewards say nothing of the unit; rounding could make their deviation more than 0.
    spreads = [group.std() for group in known if len(group) > 1 and group.min() < group.max()]
    return float(torch.stack(spreads).mean()) if spreads else 0.0


def stored_advantages(name: str, rewards: Tensor, groups: Tensor, scale: str = "group") -> Tensor:
    """The same for stored rows, whose groups may differ in size; a row alone in its group has no advantage in one.

    Args:
        name: objective by its recipe name.
        rewards: ``(R,)``.
        groups: numbers that rows of one prompt share, ``(R,)``.
        scale: as in `grpo_advantages`.

    Shape:
        returns ``(R,)``.

    Raises:
        ValueError: for an unknown name.
    """
    if name in ("reinforce", "ppo"):
        return advantages(name, rewards.unsqueeze(0)).squeeze(0)
    if name not in ("grpo", "rloo"):
        return advantages(name, rewards)  # says which names there are
    _, at, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    size = counts[at].to(rewards.dtype)
    mean = torch.zeros(len(counts)).index_add_(0, at, rewards)[at] / size
    extremes = [
        torch.zeros(len(counts)).scatter_reduce_(0, at, rewards, side, include_self=False)[at]
        for side in ("amin", "amax")
    ]
    # Rounding of the mean must not teach anything where all rewards of a group are equal.
    centred = torch.where(extremes[0] == extremes[1], 0.0, rewards - mean)
    if name == "rloo":
        # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        return centred * size / (size - 1).clamp(min=1)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (rewards.std() + _EPS)
    squares = torch.zeros(len(counts)).index_add_(0, at, centred**2)[at]
    return centred / ((squares / (size - 1).clamp(min=1)).sqrt() + _EPS)
