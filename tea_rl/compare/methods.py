"""The table of methods: what ``tea-rl compare --methods`` takes, and what each trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tea_rl.errors import TeaError, did_you_mean
from tea_rl.recipe import Recipe
from tea_rl.recipe_compare import PEER_LEARNING_RATES

Trainer: TypeAlias = Literal["grpo", "rloo", "dpo", "kto", "sft"]

#: What PEFT puts into the model, by adapter, as arguments of its configuration classes; ``full`` trains every weight.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "ia3": {},
    "prompt-tuning": {"num_virtual_tokens": 20},
    "prefix-tuning": {"num_virtual_tokens": 20},
    "p-tuning": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "full": {},
}
#: A job's share of the training time, relative to the others. Peers that generate with the trained policy are the dearest.
_COSTS: dict[Trainer, float] = {"grpo": 6.0, "rloo": 6.0, "kto": 4.0, "dpo": 3.0, "sft": 2.5}


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: as the command line takes it.
        trainer: of TRL; None for ``base``, ``best-of-n`` and ``tea``.
        adapter: what is trained: ``tea``, a key of `ADAPTERS`, or None for nothing.
        cost: its jobs' share of the training time, relative to the others.
    """

    name: str
    trainer: Trainer | None
    adapter: str | None
    cost: float

    @property
    def is_peer(self) -> bool:
        """Whether it is trained by the peers' own code."""
        return self.trainer is not None

    @property
    def is_endless(self) -> bool:
        """Whether it trains for as long as there is time, and not on a given set of rows."""
        return self.trainer in ("grpo", "rloo")


def _table() -> dict[str, Method]:
    methods = [
        Method("base", None, None, 1.0),
        Method("best-of-n", None, None, 1.0),
        Method("tea", None, "tea", _COSTS["grpo"]),
        Method("full-dpo", "dpo", "full", 2.0 * _COSTS["dpo"]),
    ]
    for adapter in ADAPTERS:
        if adapter != "full":
            methods += [
                Method(f"{trainer}-{adapter}", trainer, adapter, _COSTS[trainer]) for trainer in _COSTS
            ]
    return {method.name: method for method in methods}


METHODS = _table()


def parse_methods(text: str) -> list[Method]:
    """``"base,tea,grpo-lora"`` to methods.

    Raises:
        TeaError: an unknown method, one given twice, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise TeaError(f'--methods takes names separated by commas, such as base,tea,grpo-lora; got "{text}"')
    for name in names:
        if name not in METHODS:
            raise TeaError(
                f'no method is called "{name}".{did_you_mean(name, METHODS)} Methods: base, best-of-n, tea, full-dpo, and '
                f"{', '.join(_COSTS)} with -{', -'.join(adapter for adapter in ADAPTERS if adapter != 'full')}"
            )
        if names.count(name) > 1:
            raise TeaError(f"--methods names {name} twice; name each method once")
    return [METHODS[name] for name in names]


def check_recipe(recipe: Recipe, methods: Sequence[Method]) -> None:
    """Refuse a recipe that the methods cannot be compared on; nothing is loaded.

    Raises:
        TeaError: naming what does not fit.
    """
    if recipe.env.id is not None or recipe.offline:
        what = f"plays {recipe.env.id}" if recipe.env.id is not None else "learns from labelled data"
        raise TeaError(
            f"compare needs a recipe with data.prompts and rewards, which every method can learn from; {recipe.name} {what}; "
            "choose another recipe, such as quickstart"
        )
    if recipe.data.eval_prompts is None and recipe.data.eval_fraction == 0:
        raise TeaError(
            f"recipe {recipe.name} holds out no prompts to compare on; set data.eval_fraction or data.eval_prompts"
        )
    peers = [method for method in methods if method.is_peer]
    if peers and recipe.rollout.num_generations < 2:
        raise TeaError(
            f"{peers[0].name} compares completions of a prompt and needs rollout.num_generations of at least 2, got 1; raise it"
        )
    trained = [method for method in peers if method.adapter is not None]
    if recipe.model.quantization == "w8a8" and trained:
        raise TeaError(
            f"{trained[0].name} sends gradients through the transformer, which w8a8 products do not have; leave it out or set "
            "model.quantization to none, int8 or nf4"
        )
    if recipe.model.quantization != "none" and any(method.adapter == "full" for method in peers):
        raise TeaError(
            f"full-dpo trains every weight and needs model.quantization none, got {recipe.model.quantization}; leave full-dpo "
            "out or set model.quantization to none"
        )


def learning_rates(method: Method, recipe: Recipe) -> list[float | None]:
    """The rates that a method is tried at: a peer's grid; None where nothing is trained, and for ours, whose recipe says it."""
    if not method.is_peer or method.adapter is None:
        return [None]
    grid = {**PEER_LEARNING_RATES, **recipe.compare.learning_rates}
    return list(dict.fromkeys(grid[method.adapter]))
