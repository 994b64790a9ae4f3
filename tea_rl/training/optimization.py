"""What every learner shares: the optimizer, its schedule and the guards against numbers that are not finite."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.quantization import quiet_bitsandbytes
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig


class HeadOptimizer:
    """Steps a head along the gradients of losses that others compute.

    Args:
        head: the policy to train.
        objective, anchor, train: the recipe's groups.
        temperature: of the recorded tokens, at which the policy is defined.
        total_steps: steps of the whole run, for the learning-rate schedule.

    Attributes:
        skipped_steps: updates left out because loss or gradient was not finite.

    Raises:
        TeaError: ``train.compile`` is on, and there is no compiler that does.
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
        self.head, self.objective, self.anchor, self.train = head, objective, anchor, train
        self.temperature = temperature
        head.compiles_terms = train.compile
        if train.compile:
            # For what is not compiled as a whole, and to know at once whether there is a compiler.
            head.use_compiler("train.compile")
        self.optimizer = build_optimizer(head.trainable_parameters(), train)
        # Step n uses place n of the schedule, not n - 1: warm-up begins at 1/n and a decay ends at 1/n, where the first
        # or last step would otherwise be wasted at 0. Hence one place more, and one step ahead.
        self.scheduler = build_scheduler(self.optimizer, train, total_steps + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects an optimizer step first
            self.scheduler.step()
        self.skipped_steps = 0
        self.skipped_in_a_row = 0

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step under way."""
        return float(self.scheduler.get_last_lr()[0])

    def descend(self, loss: Tensor) -> float:
        """Clip and step, or skip the update if its loss or gradient is not finite. Returns the gradient norm.

        Raises:
            TeaError: after ``max_skipped_steps`` updates in a row that were not finite.
        """
        self.clear_gradients()
        loss.backward()
        return self.follow_gradients(loss)

    def clear_gradients(self) -> None:
        """`zero_grad` of the optimizer, in a fifth of its time."""
        for parameter in self.head.trainable_parameters():
            parameter.grad = None

    def follow_gradients(self, loss: Tensor) -> float:
        """`descend` once the gradients of ``loss`` are there."""
        parameters = self.head.trainable_parameters()
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if norm > self.train.max_grad_norm:  # where nothing is clipped, nothing is written
            clip_grads_with_norm_(parameters, self.train.max_grad_norm, norm)
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

    def end_step(self) -> None:
        """Check the head and move the schedule on.

        Raises:
            TeaError: if the head holds a number that is not finite.
        """
        # One pass instead of three: a sum of numbers of which one is not finite is not finite either.
        total = sum(parameter.detach().sum() for parameter in self.head.trainable_parameters())
        if not torch.isfinite(torch.as_tensor(total)) and not self.head.is_finite():
            raise TeaError(
                "training diverged: the head holds numbers that are not finite and is not saved; the last checkpoint "
                "stands; start a new run with a lower train.learning_rate or fewer objective.inner_epochs"
            )
        self.scheduler.step()

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


def build_scheduler(optimizer: torch.optim.Optimizer, train: TrainConfig, places: int) -> LambdaLR:
    """The schedule a recipe names, as transformers defines it, over so many places.

    The usual ones are spelt out: importing transformers' takes seconds, for its trainers' helpers and PEFT come along.
    """
    warmup = train.warmup_steps

    def constant_with_warmup(place: int) -> float:
        return place / warmup if place < warmup else 1.0

    def linear(place: int) -> float:
        falling = max(0.0, (places - place) / max(1, places - warmup))
        return place / max(1, warmup) if place < warmup else falling

    usual = {"constant_with_warmup": constant_with_warmup, "linear": linear}
    if train.lr_scheduler_type in usual:
        return LambdaLR(optimizer, usual[train.lr_scheduler_type])
    from transformers import get_scheduler

    return get_scheduler(
        train.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=places
    )


def build_optimizer(parameters: list[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer a recipe names: ``adamw``, ``ademamix`` (bitsandbytes) or ``sgd``."""
    if train.optim == "sgd":
        return torch.optim.SGD(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optim == "ademamix":
        quiet_bitsandbytes()
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
