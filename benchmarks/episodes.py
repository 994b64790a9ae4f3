"""Multi-turn rollouts: the cache kept across turns against reading the conversation again, and what environments cost.

    python benchmarks/episodes.py [--repeats 3] [--turns 6] [--parallel 64] [--env tea_rl/GuessNumber-v0 ...]

Both sides of the first comparison play the same episodes, token for token, all of ``--turns`` turns: "again" forgets the
cache after every turn, as one does who calls ``generate`` on the conversation so far. The second figure is the share of wall
time that is spent neither in the backbone nor in the head: environments, their threads, rendering and tokenising. It is
measured in the same episodes and in those of every ``--env``, of which there are twice as many as are played together, so
that finished ones are replaced.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any
from unittest.mock import patch

import gymnasium
from common import alternate, median, peak_memory_gb, report


class Hints(gymnasium.Env):
    """A number game that never ends: the hint tells how far off the last guess was."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = (options or {}).get("index", 0)
        self.target, self.turn = index * 7 % 32 + 1, 0
        return (
            f"Round {index}. Find my number from 1 to 32. Answer with one number, nothing else. I say higher or "
            "lower after every guess, and you have a few tries.\nGuess:"
        ), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        digits = "".join(letter for letter in action if letter.isdigit())[:4]
        hint = (
            "That is no number." if not digits else "Higher." if int(digits) < self.target else "Not higher."
        )
        return f"{hint} {self.turn} tries used. Guess:", 0.0, False, False, {"invalid": not digits}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument(
        "--env", nargs="*", default=["tea_rl/GuessNumber-v0", "tea_rl/Wordle-v0", "tea_rl/Taxi-v0"]
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    import torch

    from tea_rl import TeaHead, load_backbone
    from tea_rl.envs import make_env
    from tea_rl.rollout import EpisodeBatch, EpisodeSettings, EpisodeStart, run_episodes
    from tea_rl.rollout.sequences import Sequences

    backbone = load_backbone(args.model, dtype=args.dtype)
    head = TeaHead.for_backbone(backbone)
    torch.nn.init.normal_(head.members.readout, std=1e-3)  # a head that corrects, as during training
    settings = EpisodeSettings(num_parallel=args.parallel, max_new_tokens=args.tokens, max_turns=args.turns)
    starts = [
        EpisodeStart(number // args.generations, number % args.generations)
        for number in range(2 * args.parallel)
    ]
    played: dict[str, EpisodeBatch] = {}
    shares: dict[str, list[float]] = {}

    def play(name: str, make: Any, count: int) -> float:
        batch = played[name] = run_episodes(backbone, head, make, starts[:count], settings)
        shares.setdefault(name, []).append(batch.environment_seconds / batch.seconds)
        return batch.seconds

    def again() -> float:
        with patch.object(Sequences, "cut", lambda self, row: None):
            return play("again", Hints, args.parallel)

    runs = {"kept": lambda: play("kept", Hints, args.parallel), "again": again}
    for id in args.env:
        runs[id] = partial(play, id, partial(make_env, id), 2 * args.parallel)
    figures = alternate(runs, args.repeats)
    medians = {name: median(values) for name, values in figures.items()}
    batch = played["kept"]
    same = [
        one.token_ids == other.token_ids
        for one, other in zip(batch.episodes, played["again"].episodes, strict=True)
    ]
    report(
        "episodes",
        {
            "parallel": args.parallel,
            "turns": args.turns,
            "new_tokens": args.tokens,
            "dtype": str(backbone.dtype),
            "seconds": medians,
            "ratio": round(medians["again"] / medians["kept"], 2),
            "tokens_run": {name: result.tokens_run for name, result in played.items()},
            "same_episodes": round(sum(same) / len(same), 3),
            # The first one was the warm-up.
            "environment_share": {name: median(values[1:]) for name, values in shares.items()},
            "mean_turns": {
                name: round(len(one.turns) / len(one.episodes), 2) for name, one in played.items()
            },
            "failed": sum(one.num_failed for one in played.values()),
            "episodes_per_second": round(args.parallel / medians["kept"], 3),
            "all": {name: [round(v, 2) for v in values] for name, values in figures.items()},
            "peak_memory_gb": round(peak_memory_gb(), 2),
        },
    )


if __name__ == "__main__":
    main()
