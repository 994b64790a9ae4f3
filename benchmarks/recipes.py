"""Train a shipped recipe over several seeds and tabulate what its issue promises.

    python benchmarks/recipes.py quickstart --seeds 0,1,2 --output runs/bench
    python benchmarks/recipes.py arithmetic --set train.max_steps=40

Each seed is a ``tea-rl train`` in a process of its own; the figures are read from its ``metrics.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

COLUMNS = ("eval_reward", "eval_reward_greedy", "eval_kl", "eval_distinct_2", "eval_base_nll")


def run_seed(recipe: str, seed: int, output: Path, overrides: list[str]) -> dict[str, object]:
    """Train one seed (unless its folder is there already) and return its first, last and lowest evaluation."""
    folder = output / f"{recipe}-seed{seed}"
    if not (folder / "benchmark.json").exists():
        sets = [part for value in [f"train.seed={seed}", *overrides] for part in ("--set", value)]
        started = time.monotonic()
        command = [sys.executable, "-m", "tea_rl.cli", "train", recipe, "--output", str(folder), *sets]
        process = subprocess.Popen(
            command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)  # the resources of this child alone
        if status:
            raise SystemExit(f"{' '.join(command)} failed; remove {folder} before the next try")
        figures = {"wall_seconds": time.monotonic() - started, "peak_memory_gb": usage.ru_maxrss * 1024 / 1e9}
        (folder / "benchmark.json").write_text(json.dumps(figures))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_reward" in row]
    return {
        "seed": seed,
        "first": evaluations[0],
        "last": evaluations[-1],
        "lowest_eval_reward": min(row["eval_reward"] for row in evaluations),
        "training_seconds": sum(row["seconds"] for row in rows if "seconds" in row),
        **json.loads((folder / "benchmark.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    results = [
        run_seed(args.recipe, int(seed), args.output, args.overrides) for seed in args.seeds.split(",")
    ]
    extra = [name for name in results[0]["last"] if name.startswith("eval_reward/")]
    for name in (*COLUMNS, *extra):
        pairs = [(result["first"][name], result["last"][name]) for result in results]
        shown = "  ".join(f"{before:.3f} -> {after:.3f}" for before, after in pairs)
        print(
            f"{name:28} mean {mean(b for b, _ in pairs):.3f} -> {mean(a for _, a in pairs):.3f}   seeds: {shown}"
        )
    for name in ("lowest_eval_reward", "training_seconds", "wall_seconds", "peak_memory_gb"):
        print(f"{name:28} " + "  ".join(f"{result[name]:.3g}" for result in results))


if __name__ == "__main__":
    main()
