"""Stored tokens to one optimizer step of an offline objective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tea_rl.head.policy import PolicyTerms
from tea_rl.objectives.anchor import anchored_loss, with_entropy
from tea_rl.objectives.policy_gradient import behaviour_kl, clipped_surrogate
from tea_rl.objectives.preference import dpo, ipo, kto, row_sums
from tea_rl.objectives.supervised import cross_entropy, reward_weighted
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.optimization import HeadOptimizer

#: Objectives whose loss is one number a pair, and one number a row; that of the others is one a token.
PAIR_OBJECTIVES, ROW_OBJECTIVES = ("dpo", "ipo"), ("dpo", "ipo", "kto")


@dataclass
class OfflineBatch:
    """Stored tokens of one step with what their rows teach.

    Attributes:
        tokens: ``N`` tokens; their ``rows`` count the rows of the batch from 0. The last ``num_anchor`` are ordinary text that
            teaches nothing and is only held to the original model.
        signal: what each row teaches: reward, weight or advantage, and for ``kto`` 1 or 0, ``(R,)``. Pairs need none: the rows
            of a pair follow one another, chosen first.
        weights: how much each row counts, ``(R,)``.
        row_numbers: of the rows in the store, ``(R,)``.
        returns: the return that each token's completion is shown to earn, for heads with ``return_conditioning``, ``(N,)``; NaN
            where it is unknown or hidden.
        token_signal: with ``objective.token_credit``, what each token that teaches is weighed by instead, ``(N - num_anchor,)``.
        num_anchor: how many tokens are ordinary text; 0: the anchor is measured on the tokens that teach.
    """

    tokens: TokenBatch
    signal: Tensor
    weights: Tensor
    row_numbers: np.ndarray
    returns: Tensor
    token_signal: Tensor | None = None
    num_anchor: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def taught(self) -> slice:
        """The tokens that teach."""
        return slice(len(self.tokens) - self.num_anchor)


@dataclass
class StepReport:
    """What one step did; ``behaviour_kl`` is the estimate of KL(behaviour || policy) on the batch before it.

    ``kl``, ``entropy`` and ``behaviour_kl`` are those of the tokens that teach, ``anchor_kl`` that of ordinary text (NaN: none).
    """

    loss: float
    kl: float
    entropy: float
    grad_norm: float
    learning_rate: float
    behaviour_kl: float
    anchor_kl: float


class OfflineLearner(HeadOptimizer):
    """Updates a head from stored tokens; the backbone is not involved.

    Arguments are those of `HeadOptimizer`; ``total_steps`` counts optimizer steps.
    """

    def update(self, batch: OfflineBatch) -> StepReport:
        """One optimizer step.

        Raises:
            TeaError: after ``max_skipped_steps`` steps in a row with a loss or gradient that is not finite.
        """
        self.head.train()
        returns = batch.returns if self.head.config.return_conditioning else None
        terms = self.head.terms(batch.tokens, self.temperature, self.anchor.divergence, returns)
        loss = self.loss(batch, terms)
        loss.backward()
        return self.finish(batch, terms, loss)

    def finish(self, batch: OfflineBatch, terms: PolicyTerms, loss: Tensor) -> StepReport:
        """The rest of a step once the gradients of its loss are there; clears them."""
        learning_rate = self.learning_rate
        norm = self.follow_gradients(loss)
        self.clear_gradients()
        self.head.eval()
        self.end_step()
        return StepReport(
            loss.item(),
            terms.kl[batch.taught].detach().mean().item(),
            terms.entropy[batch.taught].detach().mean().item(),
            norm,
            learning_rate,
            behaviour_kl(terms.logps[batch.taught].detach(), batch.tokens.logps[batch.taught]).item(),
            terms.kl[len(batch) - batch.num_anchor :].detach().mean().item(),
        )

    def loss(self, batch: OfflineBatch, terms: PolicyTerms) -> Tensor:
        """``(task + c * anchor) / (1 + c)``, ``()``."""
        anchor = terms.anchor
        if batch.num_anchor:
            anchor, terms = anchor[-batch.num_anchor :], terms.select(batch.taught)
        if self.objective.name in ROW_OBJECTIVES:
            task = self._row_task(batch, terms)
        else:
            weights = batch.weights[batch.tokens.rows[batch.taught]]
            losses = self._token_task(batch, terms)
            if self.head.config.return_conditioning:
                # What earned the return that is shown is what to do when asked for it, however little that is.
                shown = ~batch.returns[batch.taught].isnan()
                losses = torch.where(shown, cross_entropy(terms.logps), losses)
            task = (losses * weights).sum() / weights.sum()
        task = with_entropy(task, terms.entropy, self.objective.entropy_coef)
        return anchored_loss(task, anchor.mean(), self.anchor.conservativity)

    def _token_task(self, batch: OfflineBatch, terms: PolicyTerms) -> Tensor:
        objective = self.objective
        if objective.name == "cross_entropy":
            return cross_entropy(terms.logps)
        rows = batch.tokens.rows[batch.taught]
        behaviour, base = batch.tokens.logps[batch.taught], batch.tokens.base_logps[batch.taught]
        signal = batch.signal[rows] if batch.token_signal is None else batch.token_signal
        if objective.name == "awr":
            return signal * cross_entropy(terms.logps)
        if objective.name == "reward_weighted":
            return reward_weighted(terms.logps, base, signal, objective.negative_bound)
        # The ratio to the stored behaviour is the importance weight; its clip is the trust region of a token.
        return clipped_surrogate(
            terms.logps, behaviour, signal, objective.clip_range, objective.clip_range_high
        )

    def _row_task(self, batch: OfflineBatch, terms: PolicyTerms) -> Tensor:
        objective, num_rows = self.objective, len(batch.signal)
        rows, base = batch.tokens.rows[batch.taught], batch.tokens.base_logps[batch.taught]
        gains = row_sums(terms.logps - base, rows, num_rows)
        weights = batch.weights
        if objective.name == "kto":
            distance = row_sums(terms.kl, rows, num_rows).mean()
            losses = kto(gains, batch.signal > 0.5, distance, objective.beta)
        else:
            if objective.name == "ipo":
                gains = gains / torch.bincount(rows, minlength=num_rows).clamp(min=1)
            chosen, rejected = gains.view(-1, 2).unbind(1)
            losses = (dpo if objective.name == "dpo" else ipo)(chosen, rejected, objective.beta)
            weights = weights.view(-1, 2).mean(dim=1)
        return (losses * weights).sum() / weights.sum()
