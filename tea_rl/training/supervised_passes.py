"""Passes of supervised learning over what an expert answered: before reinforcement learning begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tea_rl.head.layer import TeaHead
from tea_rl.objectives.anchor import anchored_loss
from tea_rl.recipe import Recipe
from tea_rl.training.optimization import HeadOptimizer


def supervised_passes(
    head: TeaHead,
    recipe: Recipe,
    temperature: float,
    count: int,
    size: int,
    losses: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> float:
    """Train for ``env.expert.num_train_epochs`` passes over ``count`` records, in shuffled minibatches of about ``size``.

    Args:
        head: what learns.
        recipe: how: optimizer, anchor, the expert's passes and learning rate.
        temperature: of the policy.
        losses: cross-entropy and distance to the original policy of the records at an index, one number each.

    Returns:
        mean cross-entropy of the last pass, nats.
    """
    expert, conservativity = recipe.env.expert, recipe.anchor.conservativity
    steps_per_epoch = max(1, round(count / size))
    total = max(1, round(expert.num_train_epochs * steps_per_epoch))
    train = recipe.train.model_copy(update={"learning_rate": expert.learning_rate})
    optimizer = HeadOptimizer(head, recipe.objective, recipe.anchor, train, temperature, total)
    head.train()
    seen: list[float] = []
    parts: list[Tensor] = []
    for _ in range(total):
        parts = parts or list(torch.randperm(count).chunk(steps_per_epoch))
        task, anchor = losses(parts.pop())
        optimizer.descend(anchored_loss(task.mean(), anchor.mean(), conservativity))
        optimizer.end_step()
        seen.append(task.mean().item())
    head.eval()
    last = seen[-steps_per_epoch:]
    return sum(last) / len(last)
