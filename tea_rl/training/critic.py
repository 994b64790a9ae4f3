"""The value head of multi-turn ``ppo`` with its optimizer: what a turn is worth, judged from the states the policy reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tea_rl.head.layer import TeaHead
from tea_rl.head.value import ValueConfig, ValueEstimate, ValueHead
from tea_rl.training.checkpoint import load_optimizer, save_optimizer

#: Turns in one optimizer step.
_MINIBATCH = 64
_LEARNING_RATE = 1e-3


class Critic:
    """A `ValueHead` and how it learns.

    Args:
        head: the policy whose states it reads.
        seed: of its initialisation.
        inner_epochs: passes over the turns of a step.
    """

    def __init__(self, head: TeaHead, seed: int, inner_epochs: int) -> None:
        self.value = ValueHead(head.hidden_size, ValueConfig(), head.config.context, seed).to(
            head.weight.device
        )
        self.optimizer = torch.optim.AdamW(self.value.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
        self.inner_epochs = inner_epochs

    @torch.no_grad()
    def __call__(self, states: Tensor) -> ValueEstimate:
        """Value and spread of states, ``(N, W)`` to ``(N,)`` twice."""
        self.value.eval()
        return self.value(states)

    def update(self, states: Tensor, targets: Tensor, generator: torch.Generator) -> float:
        """Regress on targets, ``(N, W)`` and ``(N,)``. Returns the mean loss; a step that is not finite is left out."""
        self.value.train()
        mask = self.value.bootstrap_mask(len(targets), generator)
        losses = []
        for _ in range(self.inner_epochs):
            for index in torch.randperm(len(targets), generator=generator).split(_MINIBATCH):
                loss = self.value.loss(states[index], targets[index], mask[:, index])
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.value.parameters(), 1.0)
                if torch.isfinite(loss):
                    self.optimizer.step()
                    losses.append(loss.item())
        self.value.eval()
        return sum(losses) / len(losses) if losses else float("nan")

    def save(self, folder: Path) -> None:
        """Write value head and optimizer into a checkpoint's folder."""
        self.value.save(folder)
        save_optimizer(folder, self.optimizer)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        self.value.load_weights(folder)
        load_optimizer(folder, self.optimizer)
