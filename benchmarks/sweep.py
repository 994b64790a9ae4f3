"""What a sweep over cached states costs beside one run, and relabel-and-retrain.

    python benchmarks/sweep.py [--rows 400] [--heads 12]

Epochs over cached states against LoRA are the stage ``offline_epoch`` of ``suite.py``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import peak_memory_gb, report, seconds


def sweep_cost(store: Path, recipe: Any, folder: Path, heads: int) -> dict[str, float]:
    """Seconds of a sweep over learning rates with one head and with ``heads``, and what the ratio cannot fall below.

    Every head has products of its own; the floor is what ``heads`` times these cost, were all else free.
    """
    from tea_rl.training.sweep import sweep

    def cost(count: int) -> float:
        rates = [1e-4 * (1 + place / 10) for place in range(count)]
        grid = {"train.learning_rate": rates}
        return seconds(lambda: sweep(store, recipe, grid, folder / f"sweep-{count}"))

    one, many = cost(1), cost(heads)
    floor = heads * members_seconds(store, recipe)
    return {
        "one_seconds": round(one, 1),
        "many_seconds": round(many, 1),
        "ratio": round(many / one, 2),
        "floor_of_ratio": round(floor / one, 2),
    }


def members_seconds(store: Path, recipe: Any) -> float:
    """Seconds that the products of one head's own weights take in as many tokens as the sweep trains on."""
    from tea_rl.head.members import PackedMembers
    from tea_rl.states import StateStore

    opened, size = StateStore.open(store), 512
    members = PackedMembers(recipe.head, opened.states.shape[1])
    states = torch.randn(size, opened.states.shape[1])

    def step() -> None:
        members(states)[0].sum().backward()

    step()
    each = statistics.median(seconds(step) for _ in range(9))
    return each * opened.num_tokens * 0.9 * recipe.train.num_train_epochs / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--heads", type=int, default=12)
    args = parser.parse_args()

    from tea_rl import train
    from tea_rl.recipe import RewardSpec, parse_recipe
    from tea_rl.states import StateStore
    from tea_rl.states.embed import embed
    from tea_rl.states.relabel import relabel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "store"
        raw: dict[str, Any] = {
            "data": {"dataset": "tea_rl/movie-reviews", "kwargs": {"size": args.rows}, "eval_fraction": 0.1},
            "objective": {"name": "reward_weighted"},
            "train": {"num_train_epochs": 3, "eval_steps": 10**6, "save_steps": 10**6},
        }
        embed(parse_recipe(raw), store)
        raw["data"] = {"store": str(store), "eval_fraction": 0.1}
        sweeps = {}
        for sizes in ([64, 64], [256, 256]):
            recipe = parse_recipe({**raw, "head": {"hidden_sizes": sizes}})
            sweeps[str(sizes)] = sweep_cost(store, recipe, folder / f"{sizes[0]}", args.heads)

        def again() -> None:
            relabel(store, [RewardSpec(name="sentiment", weight=-1.0)], folder)
            train(parse_recipe({**raw, "train": {**raw["train"], "num_train_epochs": 1}}), folder / "again")

        report(
            "sweep",
            {
                "tokens": StateStore.open(store).num_tokens,
                f"sweep_{args.heads}_over_1": sweeps,
                "relabel_and_retrain_seconds": round(seconds(again), 1),
                "peak_memory_gb": round(peak_memory_gb(), 2),
            },
        )


if __name__ == "__main__":
    main()
