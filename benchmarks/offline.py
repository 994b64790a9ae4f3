"""Epochs over cached states against LoRA fine-tuning of the same rows, what a sweep costs, and relabel-and-retrain.

    python benchmarks/offline.py [--rows 400]

LoRA is TRL's ``SFTTrainer`` with PEFT r=16 on all linear layers (loading and compilation of the data not timed). Ours reads
the rows once (``embed``) and then trains from the store: seconds of the steps themselves, as ``metrics.jsonl`` has them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import peak_memory_gb, report, seconds
from lora import sft


def step_seconds(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(row["seconds"] for row in rows if "loss" in row)


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
    args = parser.parse_args()

    from tea_rl import train
    from tea_rl.data.shipped import shipped_dataset
    from tea_rl.recipe import RewardSpec, parse_recipe
    from tea_rl.states import StateStore
    from tea_rl.states.embed import embed
    from tea_rl.states.relabel import relabel

    lines = shipped_dataset("tea_rl/movie-reviews", {"size": args.rows}).read_text().splitlines()
    texts = [{"text": json.loads(line)["completion"]} for line in lines]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = {
            "data": {"dataset": "tea_rl/movie-reviews", "kwargs": {"size": args.rows}, "eval_fraction": 0.1},
            "objective": {"name": "reward_weighted"},
            "train": {"num_train_epochs": 3, "eval_steps": 10**6, "save_steps": 10**6},
        }
        embedding = seconds(lambda: embed(parse_recipe(raw), folder / "store"))
        raw["data"] = {"store": str(folder / "store"), "eval_fraction": 0.1}
        recipe = parse_recipe(raw)
        train(recipe, folder / "run")
        tokens = StateStore.open(folder / "store").num_tokens
        ours = step_seconds(folder / "run") / (3 * 0.9 * tokens)
        sweeps = {
            str(sizes): sweep_cost(
                folder / "store",
                parse_recipe({**raw, "head": {"hidden_sizes": sizes}}),
                folder / f"{sizes[0]}",
                12,
            )
            for sizes in ([64, 64], [256, 256])
        }

        def again() -> None:
            relabel(folder / "store", [RewardSpec(name="sentiment", weight=-1.0)], folder)
            train(parse_recipe({**raw, "train": {**raw["train"], "num_train_epochs": 1}}), folder / "again")

        retrain = seconds(again)
    theirs = sft(texts, 3e-4, 1, 8)["seconds"] / tokens
    report(
        "offline",
        {
            "tokens": tokens,
            "microseconds_per_token": {
                "lora_epoch": round(theirs * 1e6),
                "later_epoch": round(ours * 1e6),
                "first_epoch_with_embedding": round((embedding / tokens + ours) * 1e6),
            },
            "lora_over_later_epoch": round(theirs / ours, 1),
            "lora_over_first_epoch": round(theirs / (embedding / tokens + ours), 1),
            "sweep_12_over_1": {k: round(many / one, 2) for k, (one, many) in sweeps.items()},
            "relabel_and_retrain_seconds": round(retrain, 1),
            "peak_memory_gb_both": round(peak_memory_gb(), 2),
        },
    )


if __name__ == "__main__":
    main()
