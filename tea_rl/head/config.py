"""What a TEA head looks like: the fields a recipe sets and a saved head carries."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ContextConfig(BaseModel):
    """Causal running means of hidden states that members read beside the last state (DESIGN section 4)."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    layers: list[int] = Field(
        default_factory=list,
        description="Layers whose states are averaged over everything read so far: 1 is the first, -1 the last; empty = "
        "off.",
    )
    horizons: list[float | Literal["all"]] = Field(
        default=["all"],
        min_length=1,
        description='How far each mean reaches back: "all" = uniform, a number = exponential with that many tokens.',
    )

    @field_validator("layers")
    @classmethod
    def _real_layers(cls, value: list[int]) -> list[int]:
        if 0 in value:
            raise ValueError("counts layers from 1 (or from the end, -1 being the last) and has no layer 0")
        return value

    @field_validator("horizons")
    @classmethod
    def _positive_horizons(cls, value: list[float | Literal["all"]]) -> list[float | Literal["all"]]:
        if any(not isinstance(horizon, str) and not 0 < horizon < float("inf") for horizon in value):
            raise ValueError('must each be "all" or a positive number of tokens')
        return value

    @property
    def num_means(self) -> int:
        """Means a position carries: layers times horizons."""
        return len(self.layers) * len(self.horizons)


def positive_widths(value: list[int]) -> list[int]:
    """Layer widths, checked."""
    if any(width < 1 for width in value):
        raise ValueError("every width must be at least 1")
    return value


class HeadConfig(BaseModel):
    """Shape and regularisation of the ensemble (DESIGN section 4); the same object in recipes and in ``tea_config.json``."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    num_members: int = Field(4, ge=1, description="Ensemble size.")
    hidden_sizes: list[int] = Field(
        default_factory=lambda: [256, 256],
        min_length=1,
        description="Layer widths of a member; their expectation when random_widths is on.",
    )
    member_kind: Literal["mlp", "memory"] = Field(
        "mlp", description="Layers of a member: mlp = dense layers, memory = key-value lookups."
    )
    memory_slots: int = Field(256, ge=1, description="Learned key-value pairs of each memory layer.")
    readout: Literal["tied", "vocab"] = Field(
        "tied",
        description="How a correction reaches the logits: tied = through the reference head, vocab = through a low-rank "
        "vocabulary projection of each member's own.",
    )
    readout_rank: int = Field(32, ge=1, description="Rank of a member's own vocabulary projection.")
    shortlist_size: int | Literal["all", "auto"] = Field(
        128,
        description='Tokens corrected one by one at each position (the rest moves together); "all" for every token; "auto" = '
        "all, trained on an estimate that touches few of them.",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout inside a member.")
    member_dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of whole members dropped per training batch; one always survives.",
    )
    feature_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="Share of the hidden features that each member sees."
    )
    random_widths: bool = Field(
        False,
        description="Draw member widths from an exponential around hidden_sizes, never below a sixth of it.",
    )
    gate: bool = Field(
        False,
        description="Let every member scale what it says by a learned gate of what it reads, so that it can keep silent where it "
        "has nothing to correct.",
    )
    aggregation: Literal["sum", "mean"] = Field("sum", description="How member corrections combine.")
    context: ContextConfig = Field(
        default_factory=ContextConfig, description="Running means that members also read; off by default."
    )
    return_conditioning: bool = Field(
        False,
        description="Let a desired return steer the policy: it scales and shifts what members read; for offline training on "
        "completions of all qualities.",
    )
    train_reference: bool = Field(
        False, description="Also train a copy of the reference head; needs anchor.conservativity 0."
    )

    _positive_widths = field_validator("hidden_sizes")(positive_widths)

    @field_validator("shortlist_size")
    @classmethod
    def _positive_shortlist(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError('must be at least 1, "all" or "auto"')
        return value
