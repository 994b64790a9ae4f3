"""Rollouts to update: the inner epochs of one online step, under a trust region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tea_rl.head.policy import PolicyTerms
from tea_rl.objectives.anchor import anchored_loss, with_entropy
from tea_rl.objectives.policy_gradient import behaviour_kl, clipped_surrogate
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.optimization import HeadOptimizer


@dataclass
class UpdateReport:
    """What one update did; losses and norms are means over its minibatches.

    ``inner_epochs`` counts passes over the data, as a fraction where the trust region ended the last one.
    """

    loss: float
    grad_norm: float
    inner_epochs: float
    learning_rate: float
    skipped_steps: int


class Learner(HeadOptimizer):
    """Updates a head from recorded tokens; the backbone is not involved.

    Arguments are those of `HeadOptimizer`; ``total_steps`` counts outer steps.
    """

    def update(
        self,
        tokens: TokenBatch,
        advantages: Tensor,
        generator: torch.Generator,
        token_values: Tensor | None = None,
        replayed: Sequence[tuple[TokenBatch, Tensor]] = (),
    ) -> UpdateReport:
        """One step: up to ``inner_epochs`` passes in shuffled minibatches.

        Stops early once KL(behaviour || policy) on a minibatch passes ``target_kl``; the first pass always completes.
        The behaviour was recorded without dropout and the update runs with it, so with dropout that distance (and the
        surrogate's ratio) holds dropout's noise as well: the trust region is then the tighter for it.

        Args:
            tokens: ``N`` tokens with their behaviour log-probabilities.
            advantages: of each token, ``(N,)``.
            generator: orders the minibatches.
            token_values: what every token of the vocabulary is worth, ``(V,)``, for ``objective.expected_gradient``.
            replayed: tokens and advantages of earlier rollouts, for the same passes; the trust region is that of ``tokens``
                alone, for the policy has long left the one that wrote these.

        Raises:
            TeaError: after ``max_skipped_steps`` minibatches in a row with a loss or gradient that is not finite.
        """

        new, records, credit = len(tokens), tokens, advantages
        if replayed:
            records = TokenBatch.join([tokens, *(old for old, _ in replayed)])
            credit = torch.cat([advantages, *(old for _, old in replayed)])

        def part(index: Tensor) -> Part:
            batch = records.select(index)
            terms = self._terms(batch, token_values)
            is_new = index < new if replayed else None
            return Part(
                terms.logps, batch.logps, credit[index], terms.anchor, terms.entropy, terms.value, is_new
            )

        return self._descend(len(records), self.objective.minibatch_tokens, part, generator)

    def skip(self) -> UpdateReport:
        """A step that learns nothing; only the schedule goes on."""
        learning_rate = self.learning_rate
        self.end_step()
        return UpdateReport(0.0, 0.0, 0.0, learning_rate, self.skipped_steps)

    def _descend(
        self, count: int, size: int, part: Callable[[Tensor], Part], generator: torch.Generator
    ) -> UpdateReport:
        """The inner epochs over ``count`` records in minibatches of ``size``."""
        learning_rate, objective = self.learning_rate, self.objective
        self.head.train()
        losses, norms, seen = [], [], 0
        for index, first_pass in self._minibatches(count, size, generator):
            found = part(index)
            if not first_pass and self._left_trust_region(found):
                break
            surrogate = clipped_surrogate(
                found.logps,
                found.behaviour_logps,
                found.advantages,
                objective.clip_range,
                objective.clip_range_high,
            )
            task = with_entropy(surrogate.mean(), found.entropy, objective.entropy_coef)
            if found.value is not None:
                task = task - objective.expected_gradient * found.value.mean()
            loss = anchored_loss(task, found.anchor.mean(), self.anchor.conservativity)
            norm = self.descend(loss)
            seen += len(index)
            losses.append(loss.item())
            norms.append(norm)
        self.head.eval()
        self.end_step()
        return UpdateReport(
            loss=sum(losses) / len(losses),
            grad_norm=sum(norms) / len(norms),
            inner_epochs=seen / count,
            learning_rate=learning_rate,
            skipped_steps=self.skipped_steps,
        )

    def _minibatches(self, count: int, size: int, generator: torch.Generator):  # noqa: ANN202
        for epoch in range(self.objective.inner_epochs):
            for index in torch.randperm(count, generator=generator).split(size):
                yield index, epoch == 0

    def _terms(self, batch: TokenBatch, token_values: Tensor | None = None) -> PolicyTerms:
        return self.head.terms(batch, self.temperature, self.anchor.divergence, token_values=token_values)

    def _left_trust_region(self, part: Part) -> bool:
        target = self.objective.target_kl
        logps, behaviour = part.logps.detach(), part.behaviour_logps
        if part.is_new is not None:
            logps, behaviour = logps[part.is_new], behaviour[part.is_new]
        return target is not None and len(logps) > 0 and behaviour_kl(logps, behaviour).item() > target


class Part(NamedTuple):
    """What a minibatch's loss is made of, one entry a token or decision; ``is_new`` None: none of them is replayed."""

    logps: Tensor
    behaviour_logps: Tensor
    advantages: Tensor
    anchor: Tensor
    entropy: Tensor
    value: Tensor | None = None
    is_new: Tensor | None = None
