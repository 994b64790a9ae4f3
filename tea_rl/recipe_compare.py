"""The group of a recipe that ``tea-rl compare`` reads."""

from __future__ import annotations

from pydantic import Field, field_validator

from tea_rl.recipe_groups import Group

#: Learning rates that ``tea-rl compare`` tries, by what is trained; those of full fine-tuning serve ``full-dpo``.
PEER_LEARNING_RATES = {
    "lora": [1e-4, 3e-4, 1e-3],
    "ia3": [1e-3, 3e-3, 1e-2],
    "prompt-tuning": [1e-3, 1e-2, 3e-2],
    "prefix-tuning": [1e-3, 1e-2, 3e-2],
    "p-tuning": [1e-4, 1e-3, 3e-3],
    "full": [1e-6, 3e-6, 1e-5],
}


class Guards(Group):
    """What a page warns of. Whatever is relative is relative to the method ``base`` of the same comparison."""

    kl_budget: float = Field(
        1.0, gt=0, description="KL to the base model, nats a token, above which a page warns."
    )
    independent_fall: float = Field(
        0.2,
        ge=0,
        description="Relative worsening of an independent metric that counts as reward hacking where the reward rose.",
    )
    diversity_floor: float = Field(
        0.7, ge=0, le=1, description="Share of the base model's distinct bigrams that has to be left."
    )
    forgetting_rise: float = Field(
        0.1, ge=0, description="Relative rise of a perplexity on other text that a page warns of."
    )
    disagreement_limit: float = Field(
        1.0, gt=0, description="Spread of the members over what they say together, above which a page warns."
    )


class CompareConfig(Group):
    """What ``tea-rl compare`` tries and how often it looks."""

    learning_rates: dict[str, list[float]] = Field(
        default_factory=dict,
        description="Learning rates tried of each adapter (lora, ia3, prompt-tuning, prefix-tuning, p-tuning, full), such as "
        "{lora: [1e-4, 1e-3]}; three each where not given. Ours is train.learning_rate.",
    )
    seeds: list[int] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="Seeds of our method."
    )
    peer_seeds: int = Field(
        1, ge=1, description="How many of these seeds each learning rate of a peer is trained with."
    )
    levels: list[float] = Field(
        default_factory=list, description="Reward levels whose time is looked up on the curves."
    )
    curve_seconds: float = Field(
        8.0,
        gt=0.0,
        description="Least seconds of training between two points of a curve, which take a third of the time at most.",
    )
    curve_prompts: int = Field(
        32, ge=1, description="Held-out prompts of a point, one sampled completion each."
    )
    num_train_epochs: float = Field(
        3.0, gt=0.0, description="dpo, kto, sft: passes over the rollouts of the original model."
    )
    strengths: list[float] = Field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5],
        description="Strengths of our head whose reward and KL are measured, nothing retrained.",
    )
    guards: Guards = Field(
        default_factory=Guards,
        description="What the page warns of, and which learning rates are passed over; may be changed afterwards.",
    )

    @field_validator("learning_rates")
    @classmethod
    def _known_adapters(cls, value: dict[str, list[float]]) -> dict[str, list[float]]:
        for name, rates in value.items():
            if name not in PEER_LEARNING_RATES:
                raise ValueError(f'has no adapter "{name}"; adapters: {", ".join(PEER_LEARNING_RATES)}')
            if not rates or min(rates) <= 0:
                raise ValueError(f"must hold at least one number above 0 for {name}")
        return value

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("must hold different whole numbers from 0 up")
        return value
