"""How kind are the generations of a head that learnt from rated film reviews?

    tea-rl train microdataset --output runs/microdataset
    python benchmarks/microdataset.py runs/microdataset/head

Completes neutral openings, about films and about anything (the quickstart's held-out half), with the original model and with the
head, and prints mean VADER compound and the share of distinct bigrams, at temperatures 1 and 0.7.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import report

FILMS = (
    "The film", "This movie", "The story of the film", "The actors in this movie", "The director of the film", "The plot",
    "The second half of the movie", "In this film, the main character", "The script", "The camera work in this film",
    "The music in the movie", "The ending of the film", "The dialogue", "A film about a family that",
    "The latest movie from the director", "This documentary",
)  # fmt: skip


def openings() -> list[str]:
    """The last 16 openings of the quickstart."""
    file = Path(__file__).parents[1] / "recipes" / "quickstart_prompts.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()][-16:]


def measure(
    backbone: Any, head: Any, prompts: list[str], temperature: float, generations: int
) -> dict[str, float]:
    """Mean VADER compound with its standard error, and distinct bigrams over all completions."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    from tea_rl.evaluation.metrics import distinct_n
    from tea_rl.rollout import DecodeSettings, generate

    settings = DecodeSettings(num_generations=generations, max_new_tokens=32, temperature=temperature)
    ids = [backbone.tokenizer(prompt).input_ids for prompt in prompts]
    texts = generate(backbone, head, ids, settings, seed=(5, 1)).texts
    analyzer = SentimentIntensityAnalyzer()
    scores = [analyzer.polarity_scores(text)["compound"] for text in texts]
    return {
        "vader": round(fmean(scores), 3),
        "standard_error": round(stdev(scores) / len(scores) ** 0.5, 3),
        "distinct_2": round(distinct_n(texts, 2), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("head")
    parser.add_argument("--generations", type=int, default=6)
    args = parser.parse_args()
    from tea_rl import TeaHead, load_backbone

    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    head = TeaHead.from_pretrained(args.head, backbone)
    figures = []
    for name, prompts in (("films", list(FILMS)), ("anything", openings())):
        for temperature in (1.0, 0.7):
            row: dict[str, Any] = {"about": name, "temperature": temperature}
            for who, strength in (("base", 0.0), ("head", 1.0)):
                head.strength = strength
                row[who] = measure(backbone, head, prompts, temperature, args.generations)
            figures.append(row)
    report("microdataset", {"openings": figures})


if __name__ == "__main__":
    main()
