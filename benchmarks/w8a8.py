"""8-bit weights and inputs (``model.quantization: w8a8``): how much faster rollouts are, and how far the model moves.

    python benchmarks/w8a8.py [--batches 1,64,256,long] [--repeats 3] [--compile]

Tokens a second of a rollout with the dense backbone, with w8a8 and (``--compile``) with w8a8 compiled, beside
``generate`` of the dense model, in turn. The distance is measured on ordinary English, in nats a token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import VARIANTS, alternate, report
from lora import unrelated_english
from stage_decode import correcting_head, generate_speed, rollout_speed

import tea_rl
from tea_rl import Backbone, TeaHead
from tea_rl.recipe import load_recipe
from tea_rl.training.online import prepare_prompts

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Prompts, generations of each and tokens of each, for a batch.
BATCHES = {"1": (1, 1, 32), "8": (1, 8, 32), "64": (8, 8, 32), "256": (32, 8, 16), "long": (2, 8, 16)}
LONG = 512


@torch.no_grad()
def distance(dense: Backbone, other: Backbone) -> dict[str, float]:
    """KL of the other model from the dense one, share of equal likeliest tokens, and both models' surprise, all a token."""
    sums = torch.zeros(5, dtype=torch.float64)
    for text in unrelated_english():
        ids = dense.tokenizer(text, return_tensors="pt").input_ids
        one, two = (backbone.model(ids).logits[0, :-1].log_softmax(-1) for backbone in (dense, other))
        kl = (one.exp() * (one - two)).sum(-1)
        next_ids = ids[0, 1:, None]
        equal = one.argmax(-1) == two.argmax(-1)
        surprise = (-logps.gather(1, next_ids).sum() for logps in (one, two))
        sums += torch.tensor([kl.sum(), equal.sum(), *surprise, len(kl)], dtype=torch.float64)
    kl, equal, first, second = (sums[:4] / sums[4]).tolist()
    return {"kl": kl, "equal_likeliest": equal, "surprise_dense": first, "surprise_w8a8": second}


def speeds(
    batch: str,
    backbones: dict[str, Backbone],
    heads: dict[str, TeaHead],
    short: list[list[int]],
    repeats: int,
) -> dict[str, Any]:
    """Tokens a second of every backbone's rollout and of ``generate``, and in brackets how many times the latter."""
    count, generations, tokens = BATCHES[batch]
    prompts = [list(ids) for ids in short[:count]]
    if batch == "long":
        prompts = [(ids * (LONG // len(ids) + 1))[:LONG] for ids in prompts]
    shape = (prompts, generations, tokens)
    runs: dict[str, Callable[[], float]] = {
        name: lambda name=name: rollout_speed(backbones[name], heads[name], *shape)[0] for name in backbones
    }
    runs["generate"] = partial(generate_speed, backbones["dense"], *shape)
    values = alternate(runs, repeats)
    peer = median(values["generate"])
    return {name: f"{median(found):.1f} ({median(found) / peer:.2f})" for name, found in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,64,256,long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    backbones = {
        "dense": tea_rl.load_backbone(MODEL),
        "w8a8": tea_rl.load_backbone(MODEL, quantization="w8a8"),
    }
    report("w8a8 distance", {name: round(value, 4) for name, value in distance(*backbones.values()).items()})
    if args.compile:
        backbones["w8a8 compiled"] = tea_rl.load_backbone(MODEL, **VARIANTS["w8a8, compiled"])
    heads = {name: correcting_head(backbone) for name, backbone in backbones.items()}
    short = prepare_prompts(load_recipe("quickstart"), backbones["dense"])[0].token_ids
    for batch in args.batches.split(","):
        report(f"w8a8 batch {batch}", speeds(batch, backbones, heads, short, args.repeats))


if __name__ == "__main__":
    main()
