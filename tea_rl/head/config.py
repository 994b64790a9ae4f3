"""What a TEA head looks like: the fields a recipe sets and a saved head carries."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class HeadConfig(BaseModel):
    """Shape and regularisation of the ensemble (DESIGN section 4); the same object in recipes and in ``tea_config.json``."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    num_members: int = Field(4, ge=1, description="Ensemble size.")
    hidden_sizes: list[int] = Field(
        default_factory=lambda: [256, 256],
        min_length=1,
        description="Layer widths of a member; their expectation when random_widths is on.",
    )
    readout: Literal["tied"] = Field(
        "tied", description="How a correction reaches the logits: tied = through the reference head."
    )
    shortlist_size: int | Literal["all"] = Field(
        128,
        description='Tokens corrected one by one at each position (the rest moves together); "all" for every token.',
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
    aggregation: Literal["sum", "mean"] = Field("sum", description="How member corrections combine.")
    train_reference: bool = Field(
        False, description="Also train a copy of the reference head; needs anchor.conservativity 0."
    )

    @field_validator("hidden_sizes")
    @classmethod
    def _positive_widths(cls, value: list[int]) -> list[int]:
        if any(width < 1 for width in value):
            raise ValueError("every width must be at least 1")
        return value

    @field_validator("shortlist_size")
    @classmethod
    def _positive_shortlist(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError('must be at least 1, or "all"')
        return value
