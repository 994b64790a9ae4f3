"""What a sweep over cached states costs beside one run, and relabel-and-retrain.

    python benchmarks/sweep.py [--rows 400] [--heads 12]

Epochs over cached states against LoRA are the stage ``offline_epoch`` of ``suite.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import peak_memory_gb, report, seconds


def sweep_cost(store: Path, recipe: Any, folder: Path, heads: int) -> tuple[float, float]:
    """Seconds of a sweep over learning rates with one head and with ``heads``."""
    from tea_rl.training.sweep import sweep

    def cost(count: int) -> float:
        rates = [1e-4 * (1 + place / 10) for place in range(count)]
        grid = {"train.learning_rate": rates}
        return seconds(lambda: sweep(store, recipe, grid, folder / f"sweep-{count}"))

    return cost(1), cost(heads)


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
            one, many = sweep_cost(store, recipe, folder / f"{sizes[0]}", args.heads)
            sweeps[str(sizes)] = round(many / one, 2)

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
