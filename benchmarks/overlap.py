"""What a slow reward costs a step of the quickstart, computed after generating and, by worker processes, meanwhile.

    python benchmarks/overlap.py [--seconds 4] [--steps 6]

The reward waits, as one that asks a network would, and then gives the quickstart's own sentiment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from common import report

REWARD = """
import time
from tea_rl.rewards.builtin import BUILTIN_REWARDS

score = BUILTIN_REWARDS["sentiment"]()

def slow(prompts, completions, **columns):
    time.sleep({seconds})
    return score(prompts=prompts, completions=completions)
"""


def step_seconds(folder: Path, workers: int, steps: int, seconds: float) -> float:
    """Median seconds of a step, the first and the last one left out: nothing is generated ahead of the one or in the other."""
    from tea_rl import load_recipe, train

    (folder / "slow.py").write_text(REWARD.format(seconds=seconds))
    overrides = [
        f"rewards=[{{name: '{folder}/slow.py:slow'}}]",
        "data.eval_fraction=0",
        "rollout.early_steps=0",
        "objective.counterfactuals=0",  # for rewards that cost little
        "train.save_steps=1000",
    ]
    overrides += [f"train.max_steps={steps}", f"rollout.reward_workers={workers}"]
    output = folder / f"workers-{workers}"
    train(load_recipe("quickstart", overrides), output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return median([row["seconds"] for row in rows if "seconds" in row][1:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for label, workers, seconds in (
            ("fast reward", 0, 0.0),
            ("slow reward", 0, args.seconds),
            ("slow reward, 1 worker", 1, args.seconds),
        ):
            folder = Path(name) / label.replace(" ", "-").replace(",", "")
            folder.mkdir()
            found[f"{label}: seconds a step"] = round(step_seconds(folder, workers, args.steps, seconds), 2)
    report("overlap", {"reward_seconds": args.seconds, **found})


if __name__ == "__main__":
    main()
