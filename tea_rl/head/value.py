"""The value head: an ensemble over the same cached states that estimates the return still to come, and how unsure it is.

Its members are those of the TEA head (`tea_rl.head.members.PackedFeatures`), each with a readout of its own that starts at
zero. They begin at different weights and learn from different turns (`ValueHead.bootstrap_mask`), so they agree where there was
data and part where there was none; their spread is the uncertainty (bootstrapped ensemble, Osband et al. 2016).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tea_rl.errors import TeaError
from tea_rl.head.config import ContextConfig, HeadConfig, positive_widths
from tea_rl.head.members import PackedFeatures
from tea_rl.training.files import atomic_write_bytes, atomic_write_text, disk_errors

VALUE_CONFIG_NAME = "value_config.json"
VALUE_WEIGHTS_NAME = "value_head.safetensors"


class ValueConfig(BaseModel):
    """Shape of the value head."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    num_members: int = Field(4, ge=1, description="Ensemble size; the spread of a single member is 0.")
    hidden_sizes: list[int] = Field(
        default=[64], min_length=1, description="Layer widths of a member, each at least 1."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout inside a member.")
    feature_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="Share of the hidden features that each member sees."
    )
    data_share: float = Field(
        0.8, gt=0.0, le=1.0, description="Share of the turns that each member learns from, drawn per rollout."
    )
    scale: float = Field(
        1.0,
        gt=0.0,
        description="Typical size of a return: values and their loss are measured in it, so that it sets how fast they learn.",
    )

    _positive_widths = field_validator("hidden_sizes")(positive_widths)


class ValueEstimate(NamedTuple):
    """Expected return from a state, and standard deviation over the members, each ``(N,)``, in units of the reward."""

    mean: Tensor
    spread: Tensor


class ValueHead(nn.Module):
    """``K`` small networks that each answer with one number. A fresh one answers 0.

    Args:
        hidden_size: ``D`` of the backbone.
        config: shape of the ensemble.
        context: of the policy head whose states it reads (wide with context features).
        seed: of the initialisation.

    Attributes:
        state_width: ``W``, numbers a state has.
    """

    def __init__(
        self,
        hidden_size: int,
        config: ValueConfig | None = None,
        context: ContextConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.context = config or ValueConfig(), context or ContextConfig()
        self.hidden_size = hidden_size
        self.state_width = hidden_size * (1 + self.context.num_means)
        shape = HeadConfig(
            num_members=self.config.num_members,
            hidden_sizes=self.config.hidden_sizes,
            dropout=self.config.dropout,
            feature_fraction=self.config.feature_fraction,
            context=self.context,
        )
        self.members = PackedFeatures(shape, hidden_size, torch.Generator().manual_seed(seed))
        self.readout = nn.Parameter(torch.zeros(self.config.num_members, self.members.packed_width, 1))
        self.bias = nn.Parameter(torch.zeros(self.config.num_members, 1, 1))

    def member_values(self, states: Tensor) -> Tensor:
        """What each member answers, ``(N, W)`` to ``(K, N)``, float32.

        Raises:
            TeaError: for states of another width.
        """
        if states.shape[-1] != self.state_width:
            raise TeaError(
                f"the value head reads {self.state_width} numbers a state, got {states.shape[-1]}; "
                "make it for the model and head.context of the policy"
            )
        answers = torch.baddbmm(self.bias, self.members.features(states), self.readout)
        return self.config.scale * answers.squeeze(2)

    def forward(self, states: Tensor) -> ValueEstimate:
        """Values of states, ``(N, W)``; mean and spread over the members."""
        values = self.member_values(states)
        return ValueEstimate(values.mean(dim=0), values.std(dim=0, correction=0))

    def bootstrap_mask(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Which member learns from which of ``count`` turns, ``(K, count)`` bool; draw it once for the data of an update.

        Every turn has at least one member.
        """
        num_members = self.config.num_members
        draws = torch.rand(num_members, count, generator=generator)
        mask = draws < self.config.data_share
        return mask.scatter_(0, draws.argmin(dim=0, keepdim=True), True)

    def loss(self, states: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of ``((v_k(s) - target) / scale)^2 / 2`` over members and their turns, ``()``.

        Args:
            states: ``(N, W)``.
            targets: e.g. ``value_targets`` of `tea_rl.objectives.credit.gae`, ``(N,)``; no gradient passes.
            mask: `bootstrap_mask` of these turns, ``(K, N)``; None: every member learns from every turn.
        """
        errors = (self.member_values(states) - targets.detach().float()) / self.config.scale
        squares = 0.5 * errors.square()
        if mask is None:
            return squares.mean()
        mask = mask.to(squares.device, squares.dtype)
        return (squares * mask).sum() / mask.sum().clamp(min=1.0)

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write ``value_config.json`` and ``value_head.safetensors`` into ``folder`` (made if missing), each in full or not.

        Raises:
            TeaError: if a number is not finite (nothing is written then), or the disk refuses.
        """
        if not self.is_finite():
            raise TeaError(
                "the value head holds numbers that are not finite and was not saved; resume from the last checkpoint"
            )
        folder = Path(folder)
        about = {
            "hidden_size": self.hidden_size,
            "context": self.context.model_dump(),
            "value_head": self.config.model_dump(),
        }
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with disk_errors(f"save the value head in {folder}", "save it again"):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(folder / VALUE_WEIGHTS_NAME, save(weights))
            atomic_write_text(folder / VALUE_CONFIG_NAME, json.dumps(about, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ValueHead:
        """The value head that `save` wrote, in evaluation mode on the CPU.

        Raises:
            TeaError: if it is missing or damaged.
        """
        path = Path(folder) / VALUE_CONFIG_NAME
        if not path.is_file():
            raise TeaError(
                f"expected a value head in {folder}, but it has no {VALUE_CONFIG_NAME}; "
                "train with a value head, or give the folder of one"
            )
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            head = cls(
                int(about["hidden_size"]),
                ValueConfig(**about["value_head"]),
                ContextConfig(**about["context"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TeaError(
                f"{path} is not a valid value head configuration ({_first_line(error)}); take another copy of it"
            ) from error
        head.load_weights(folder)
        return head.eval()

    def load_weights(self, folder: str | Path) -> None:
        """Fill a value head of the same configuration from ``value_head.safetensors``.

        Raises:
            TeaError: if the file is missing, damaged or of another shape; the head keeps what it had.
        """
        path = Path(folder) / VALUE_WEIGHTS_NAME
        try:
            tensors, own = load_file(path), self.state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
                raise ValueError("other names or shapes than the configuration asks for")
            self.load_state_dict(tensors)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise TeaError(
                f"{path} is not a readable value head ({_first_line(error)}); take another copy of it"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
