"""Made-up comparisons, realistic enough to look at, for the tests of summary and page."""

from __future__ import annotations

import math
import random
from typing import Any

from tea_rl.compare.results import (
    CurvePoint,
    Forgetting,
    FrontierPoint,
    KlEstimate,
    MethodResult,
    Metrics,
    Results,
    Sample,
    SeedResult,
    Tried,
)

PROMPTS = [
    "The movie was", "Our neighbour's dog", "The train to the coast", "My grandmother's kitchen", "The new teacher",
    "In the middle of winter, the village", "The concert last night", "After the meeting, everyone", "The soup",
    "Her first day at work", "The garden behind the house", "A stranger on the bus", "The hotel room",
    "When the lights went out, we", "The old library", "My brother's bicycle", "The weather this week",
    "The last chapter of the book", "Their holiday in the mountains", "The football match", "The museum",
    "At the end of the street, there", "The doctor", "The birthday party",
]  # fmt: skip
_PLAIN = (
    " a bit long and nobody in the room could say how it had ended",
    " always there in the morning, waiting for someone to come out",
    " was late again, and the people on the platform looked at their watches",
    " closed for repairs until the end of the month",
)
_HAPPY = (
    " a wonderful surprise for everyone, full of warm colours and kind people",
    " became the best part of our week, and we laughed all the way home",
    " turned out lovely: fresh bread, good friends and a beautiful view",
    " made us proud and happy, a great gift to the whole town",
)
_HACKED = (" great great great love great best great love great great win great",)


def completion(texts: tuple[str, ...], reward: float, prompt: str, seed: int) -> Sample:
    rng = random.Random(f"{seed}{prompt}{texts[0]}")
    text = rng.choice(texts)
    words = [" " + word for word in text.split()]
    strong = {
        "wonderful",
        "warm",
        "kind",
        "best",
        "laughed",
        "lovely:",
        "good",
        "beautiful",
        "happy,",
        "great",
        "proud",
        "love",
    }
    gains = [rng.gauss(0, 0.15) + (1.8 if word.strip() in strong else 0.0) for word in words]
    if texts is _PLAIN:
        gains = [0.0] * len(words)
    noisy = reward + rng.gauss(0, 0.15)
    return Sample(
        prompt=prompt,
        completion=text,
        reward=noisy,
        terms={"sentiment": noisy + 0.05, "repetition": -0.02},
        tokens=words,
        gains=[round(gain, 3) for gain in gains],
    )


def metrics(reward: float, seed: int = 0, num_prompts: int = 24, **given: Any) -> Metrics:
    rng = random.Random(seed)
    hard = random.Random(99)
    difficulty = [hard.gauss(0, 0.2) for _ in range(num_prompts)]
    values: dict[str, Any] = {
        "reward_sampled": [min(1.0, reward + d + rng.gauss(0, 0.1)) for d in difficulty],
        "reward_greedy": [min(1.0, reward + 0.05 + d) for d in difficulty],
        "terms": {"sentiment": reward + 0.04, "repetition": -0.02},
        "surprise": 3.1,
        "distinct_1": 0.5,
        "distinct_2": 0.9,
        "self_repetition": 0.08,
        "length": 30.4,
        "kl": KlEstimate(value=0.4, kind="exact", monte_carlo=0.42),
        "forgetting": Forgetting(
            english_perplexity=14.2,
            tasks={"family_relationships": 9.1, "spell_backward": 40.2, "count_primes": 6.3},
        ),
        "independent": {"surprise": 3.1, "compressed_share": 0.45},
    }
    values.update(given)
    values["independent"] = {**values["independent"], "surprise": values["surprise"]}
    return Metrics(**values)


def curve(
    top: float, half: float, seconds: float, calls: float, start: float = 0.26, points: int = 14
) -> list[CurvePoint]:
    rng = random.Random(f"{top}{half}{seconds}")
    found = []
    for number in range(points):
        at = seconds * number / (points - 1)
        reward = start + (top - start) * (1 - math.exp(-at / half)) + rng.gauss(0, 0.015)
        found.append(
            CurvePoint(
                seconds=at, step=number * 2, reward_calls=round(calls * number / (points - 1)), reward=reward
            )
        )
    return found


def seed_result(reward: float, texts: tuple[str, ...] = _HAPPY, seed: int = 0, **given: Any) -> SeedResult:
    values: dict[str, Any] = {
        "seed": seed,
        "train_seconds": 100.0 + 7 * seed,
        "peak_memory_bytes": 1_190_000_000 + seed * 20_000_000,
        "trainable_parameters": 2_030_000,
        "size_on_disk_bytes": 8_100_000,
        "reward_calls": 1152,
        "generation_tokens_per_second": 251.0,
        "metrics": metrics(reward, seed),
        "samples": [completion(texts, reward, prompt, seed) for prompt in PROMPTS],
    }
    return SeedResult(**{**values, **given})


def base() -> MethodResult:
    found = metrics(
        0.26, kl=KlEstimate(value=0.0, kind="exact", monte_carlo=0.0), surprise=3.25, distinct_2=0.94,
        independent={"compressed_share": 0.47},
    )  # fmt: skip
    seed = seed_result(
        0.26, _PLAIN, metrics=found, train_seconds=0.0, trainable_parameters=0, size_on_disk_bytes=0, reward_calls=0,
        peak_memory_bytes=900_000_000,
    )  # fmt: skip
    return MethodResult(name="base", status="done", seeds=[seed])


def tea(seeds: int = 3) -> MethodResult:
    runs = []
    for number in range(seeds):
        reward = 0.83 + 0.01 * number
        frontier = [
            FrontierPoint(
                strength=a, reward=0.26 + (reward - 0.26) * (1 - (1 - a / 1.5) ** 2) * 1.08, kl=0.5 * a * a
            )
            for a in (0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
        ]
        runs.append(
            seed_result(
                reward,
                seed=number,
                curve=curve(0.88, 24 + 3 * number, 104, 1152),
                frontier=frontier,
                metrics=metrics(
                    reward,
                    number,
                    kl=KlEstimate(value=0.49 + 0.02 * number, kind="exact", monte_carlo=0.51),
                    surprise=2.97,
                    distinct_2=0.84,
                    disagreement=0.41,
                ),
            )  # fmt: skip
        )
    return MethodResult(name="tea", status="done", adapter="tea", seeds=runs)


def lora(name: str = "grpo-lora", reward: float = 0.79, level: float = 260.0, **given: Any) -> MethodResult:
    seed = seed_result(
        reward,
        train_seconds=620.0,
        peak_memory_bytes=7_570_000_000,
        trainable_parameters=4_880_000,
        size_on_disk_bytes=19_600_000,
        reward_calls=1408,
        curve=curve(reward + 0.06, level, 620, 1408),
        generation_tokens_per_second=180.0,
        metrics=metrics(
            reward, 5, kl=KlEstimate(value=0.62, kind="exact", monte_carlo=0.66), surprise=2.8, distinct_2=0.78,
            forgetting=Forgetting(
                english_perplexity=15.9,
                tasks={"family_relationships": 9.9, "spell_backward": 44.0, "count_primes": 6.6},
            ),
        ),
    )  # fmt: skip
    tried = [
        Tried(learning_rate=1e-4, reward=0.34, seconds=610, status="done"),
        Tried(learning_rate=3e-4, reward=0.58, seconds=615, status="done"),
        Tried(learning_rate=1e-3, reward=reward, seconds=620, status="done"),
    ]
    values = {
        "name": name,
        "status": "done",
        "adapter": "lora",
        "learning_rate": 1e-3,
        "tried": tried,
        "seeds": [seed],
    }
    return MethodResult(**{**values, **given})


def hacker(name: str = "rloo-lora") -> MethodResult:
    """Most reward of all, by writing one word."""
    seed = seed_result(
        0.97, _HACKED, train_seconds=600.0, peak_memory_bytes=7_400_000_000, trainable_parameters=4_880_000,
        curve=curve(0.99, 120, 600, 1400), reward_calls=1400,
        metrics=metrics(
            0.97, 6, kl=KlEstimate(value=1.9, kind="exact", monte_carlo=1.8), surprise=4.6, distinct_2=0.21,
            independent={"compressed_share": 0.11}, self_repetition=0.7,
        ),
    )  # fmt: skip
    return MethodResult(
        name=name, status="done", adapter="lora", learning_rate=1e-3,
        tried=[Tried(learning_rate=1e-3, reward=0.97, seconds=600, status="done")], seeds=[seed],
    )  # fmt: skip


def best_of_n() -> MethodResult:
    seed = seed_result(
        0.71, train_seconds=0.0, trainable_parameters=0, size_on_disk_bytes=0, reward_calls=0, peak_memory_bytes=910_000_000,
        metrics=metrics(0.71, 8, kl=KlEstimate(value=0.04, kind="bound"), surprise=3.2, distinct_2=0.93),
    )  # fmt: skip
    return MethodResult(name="best-of-n", status="done", uses_reward_at_inference=True, seeds=[seed])


def failed() -> list[MethodResult]:
    return [
        MethodResult(name="full-dpo", status="memory", adapter="full", reason="needed more than 8.0 GB after 41 s"),
        MethodResult(
            name="kto-lora", status="failed", adapter="lora", reason="ValueError: <b>no pairs</b> left",
            tried=[Tried(learning_rate=1e-3, status="failed", reason="ValueError: <b>no pairs</b> left")],
        ),
        MethodResult(name="sft-prompt-tuning", status="skipped", adapter="prompt-tuning", reason="no time left"),
    ]  # fmt: skip


def comparison(*methods: MethodResult, **given: Any) -> Results:
    values: dict[str, Any] = {
        "recipe": "quickstart",
        "created": "2026-11-22T14:00:00+00:00",
        "command": "tea-rl compare quickstart --methods base,tea,grpo-lora,rloo-lora",
        "settings": {
            "max_seconds": 2400.0,
            "adapters": {"lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}},
            "recipe": {
                "description": "Teach a 135M model to continue everyday sentences cheerfully.",
                "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "bfloat16"},
                "rewards": [{"name": "sentiment", "weight": 1.0}, {"name": "repetition", "weight": 2.0}],
                "rollout": {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 32},
                "train": {"learning_rate": 4e-4, "max_steps": 18, "seed": 0},
            },
        },
        "versions": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "trl": "1.16.0",
            "tea-rl": "0.1.0",
        },
        "machine": {"processor": "x86_64", "cores": 2, "memory_bytes": 24_000_000_000},
        "levels": [0.5, 0.7, 0.8],
    }
    return Results(methods=list(methods), **{**values, **given})


def full_comparison() -> Results:
    dpo = lora("dpo-lora", 0.52, 60.0, learning_rate=3e-4)
    return comparison(base(), best_of_n(), tea(), lora(), hacker(), dpo, *failed())
