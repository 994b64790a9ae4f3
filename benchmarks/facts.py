"""Facts through the tail against LoRA: held-out questions about invented people, same rows, same run.

    python benchmarks/facts.py [--rates 3e-4,1e-3] [--epochs 6]

Ours embeds the recipe's rows and trains from that store; the other side is TRL's ``SFTTrainer`` with PEFT LoRA
r=16 on all linear layers, evaluated after every epoch (evaluation is not timed). Accuracy counts a row as right when
every token of its answer is ranked first. Forgetting is the perplexity on the Python language reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import report, seconds
from lora import perplexity, row_accuracy, sft, unrelated_english

LEVEL = 0.8


def run(*command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "tea_rl.cli", *command],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ours(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Embed, train, and read accuracy against seconds: as for LoRA, loading the model and evaluating are not timed."""
    from tea_rl import TeaHead, load_backbone, load_recipe
    from tea_rl.states.embed import embed

    store, run_path = folder / "store", folder / "run"
    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    recipe = load_recipe("facts", overrides)
    embedding = seconds(lambda: embed(recipe, store, backbone=backbone))
    sets = [part for value in overrides for part in ("--set", value)]
    run("train", "facts", "--store", str(store), "--output", str(run_path), *sets)
    curve, spent = [], embedding
    for line in (run_path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        spent += row.get("seconds", 0.0)
        if "eval_row_accuracy" in row:
            curve.append((round(spent, 1), row["eval_row_accuracy"], row["eval_anchor_kl"]))
    texts = unrelated_english()
    before = perplexity(backbone.model, backbone.tokenizer, texts)
    backbone.install(TeaHead.from_pretrained(run_path / "head", backbone))
    after = perplexity(backbone.model, backbone.tokenizer, texts)
    return {
        "embedding_seconds": round(embedding, 1),
        "curve": curve,
        "seconds_to_level": first_at([point[:2] for point in curve]),
        "perplexity": [before, after],
    }


def lora(rate: float, epochs: int) -> dict[str, Any]:
    """Train LoRA at one rate and read accuracy against seconds."""
    from tea_rl.data.shipped import shipped_dataset

    rows = [json.loads(line) for line in shipped_dataset("tea_rl/facts", {}).read_text().splitlines()]
    training = [{k: r[k] for k in ("prompt", "completion")} for r in rows if r["split"] == "train"]
    held_out = [r for r in rows if r["split"] == "test"]
    curve: list[tuple[float, float, float]] = []

    def after_epoch(model: Any, elapsed: float, epoch: int) -> bool:
        accuracy = row_accuracy(model, tokenizer, held_out)
        curve.append((round(elapsed, 1), accuracy, perplexity(model, tokenizer, texts)))
        print(f"lora {rate:g} epoch {epoch}: {curve[-1]}", file=sys.stderr, flush=True)
        return accuracy >= 0.99

    from transformers import AutoTokenizer

    from tea_rl.packaged import packaged_model

    tokenizer, texts = AutoTokenizer.from_pretrained(packaged_model()), unrelated_english()
    sft(training, rate, epochs, 16, after_epoch)
    return {"curve": curve, "seconds_to_level": first_at([point[:2] for point in curve])}


def first_at(curve: list[tuple[float, float]]) -> float | None:
    """Seconds at which the level was first reached."""
    return next((at for at, accuracy in curve if accuracy >= LEVEL), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="3e-4,1e-3")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--only", choices=("ours", "lora"))
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.only != "lora":
        with tempfile.TemporaryDirectory() as folder:
            figures["tea_rl"] = ours(Path(folder), args.overrides)
    if args.only != "ours":
        figures["lora"] = {rate: lora(float(rate), args.epochs) for rate in args.rates.split(",")}
    report("facts", figures)


if __name__ == "__main__":
    main()
