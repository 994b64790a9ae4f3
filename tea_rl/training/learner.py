"""States to update: the inner epochs of one step, under a trust region and with guards."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.head.layer import PolicyTerms, TeaHead
from tea_rl.head.policy import Shortlist
from tea_rl.objectives.anchor import anchored_loss
from tea_rl.objectives.policy_gradient import behaviour_kl, clipped_surrogate
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout.trajectory import TokenBatch


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


class Learner:
    """Updates a head from recorded tokens; the backbone is not involved.

    Args:
        head: the policy to train.
        objective, anchor, train: the recipe's groups.
        temperature: of the rollouts, at which the policy is defined.
        total_steps: outer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(
        self,
        head: TeaHead,
        objective: ObjectiveConfig,
        anchor: AnchorConfig,
        train: TrainConfig,
        temperature: float,
        total_steps: int,
    ) -> None:
        from transformers import get_scheduler

        self.head, self.objective, self.anchor, self.train = head, objective, anchor, train
        self.temperature = temperature
        self.optimizer = build_optimizer(head.trainable_parameters(), train)
        # Step n uses place n of the schedule, not n - 1: warm-up begins at 1/n and a decay ends at 1/n, where the first
        # or last step would otherwise be wasted at 0. Hence one place more, and one step ahead.
        self.scheduler = get_scheduler(
            train.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=total_steps + 1,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects an optimizer step first
            self.scheduler.step()
        self.skipped_steps = 0
        self.skipped_in_a_row = 0

    def update(self, tokens: TokenBatch, advantages: Tensor, generator: torch.Generator) -> UpdateReport:
        """One step: up to ``inner_epochs`` passes in shuffled minibatches.

        Stops early once KL(behaviour || policy) on a minibatch passes ``target_kl``; the first pass always completes.
        The behaviour was recorded without dropout and the update runs with it, so with dropout that distance (and the
        surrogate's ratio) holds dropout's noise as well: the trust region is then the tighter for it.

        Args:
            tokens: ``N`` tokens with their behaviour log-probabilities.
            advantages: of each token, ``(N,)``.
            generator: orders the minibatches.

        Raises:
            TeaError: after ``max_skipped_steps`` minibatches in a row with a loss or gradient that is not finite.
        """
        learning_rate = self.scheduler.get_last_lr()[0]
        self.head.train()
        losses, norms, seen = [], [], 0
        for index, first_pass in self._minibatches(len(tokens), generator):
            batch = tokens.select(index)
            terms = self._terms(batch)
            if not first_pass and self._left_trust_region(terms, batch):
                break
            surrogate = clipped_surrogate(
                terms.logps,
                batch.logps,
                advantages[index],
                self.objective.clip_range,
                self.objective.clip_range_high,
            )
            loss = anchored_loss(surrogate.mean(), terms.anchor.mean(), self.anchor.conservativity)
            norm = self._descend(loss)
            seen += len(index)
            losses.append(loss.item())
            norms.append(norm)
        self.head.eval()
        if not self.head.is_finite():
            raise TeaError(
                "training diverged: the head holds numbers that are not finite and is not saved; the last checkpoint "
                "stands; start a new run with a lower train.learning_rate or fewer objective.inner_epochs"
            )
        self.scheduler.step()
        return UpdateReport(
            loss=sum(losses) / len(losses),
            grad_norm=sum(norms) / len(norms),
            inner_epochs=seen / len(tokens),
            learning_rate=learning_rate,
            skipped_steps=self.skipped_steps,
        )

    def _minibatches(self, count: int, generator: torch.Generator):  # noqa: ANN202
        for epoch in range(self.objective.inner_epochs):
            for index in torch.randperm(count, generator=generator).split(self.objective.minibatch_tokens):
                yield index, epoch == 0

    def _terms(self, batch: TokenBatch) -> PolicyTerms:
        if batch.shortlist is None:
            return self.head.full_terms(batch.states, batch.actions, self.temperature, self.anchor.divergence)
        # Tokens chosen in the same state share everything but the action: short answers are mostly such tokens.
        states, at = torch.unique(batch.state_ids, return_inverse=True)
        first = torch.empty_like(states).scatter_(0, at, torch.arange(len(at), device=at.device))
        shortlist = Shortlist(*(part[first] for part in batch.shortlist))
        return self.head.shortlist_terms(
            batch.states[first],
            shortlist,
            batch.slots,
            batch.within_tail_logps,
            self.temperature,
            self.anchor.divergence,
            at,
        )

    def _left_trust_region(self, terms: PolicyTerms, batch: TokenBatch) -> bool:
        target = self.objective.target_kl
        return target is not None and behaviour_kl(terms.logps.detach(), batch.logps).item() > target

    def _descend(self, loss: Tensor) -> float:
        """Clip and step, or skip the minibatch if its loss or gradient is not finite. Returns the gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.head.trainable_parameters(), self.train.max_grad_norm)
        if torch.isfinite(loss) and torch.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.train.max_skipped_steps:
                raise TeaError(
                    f"training diverged: {self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite; "
                    "start a new run with a lower train.learning_rate or fewer objective.inner_epochs"
                )
        return norm.item()

    def state(self) -> dict[str, Any]:
        """Counters and schedule, as JSON values; the optimizer's tensors are saved apart."""
        schedule = {
            k: v for k, v in self.scheduler.state_dict().items() if isinstance(v, int | float | bool | list)
        }
        schedule.pop("lr_lambdas", None)
        return {
            "scheduler": schedule,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.scheduler.__dict__.update(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


def build_optimizer(parameters: list[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer a recipe names: ``adamw``, ``ademamix`` (bitsandbytes) or ``sgd``."""
    if train.optim == "sgd":
        return torch.optim.SGD(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optim == "ademamix":
        from bitsandbytes.optim import AdEMAMix

        return AdEMAMix(
            parameters,
            lr=train.learning_rate,
            betas=(*betas, 0.9999),
            weight_decay=train.weight_decay,
            optim_bits=32,
        )
    return torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=betas, weight_decay=train.weight_decay, fused=True
    )
