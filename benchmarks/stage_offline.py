"""An epoch over cached states against an epoch of TRL's ``SFTTrainer`` and ``DPOTrainer`` with LoRA, on the same rows.

Rows are passages of the Python language reference: some words, and how they go on; of a preference pair the rejected side has
its words in reverse. Ours reads them once (``embed``, told beside the figure) and trains from the store: seconds of the steps
themselves, as ``metrics.jsonl`` has them. TRL's side is the time between the trainer's start and its end, data prepared.

Limit: `limits.HeadWork.update` over the tokens of an epoch, and their states read from the store once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import OURS, Figure, Setting, alternate, median, passages, seconds
from limits import HeadWork, Work
from lora import dpo, sft

from tea_rl import train
from tea_rl.recipe import parse_recipe
from tea_rl.states import StateStore
from tea_rl.states.embed import embed

_BATCH = 8


def run(setting: Setting) -> Iterator[Figure]:
    """Measure the stage."""
    rows = setting.pick(passage_rows(16, 4, 8), passage_rows(32, 12, 24))
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    yield _epoch(setting, "cross_entropy", texts, "trl_sft_lora", sft)
    yield _epoch(setting, "dpo", rows, "trl_dpo_lora", dpo)


def passage_rows(count: int, before: int, after: int) -> list[dict[str, str]]:
    """``prompt``, ``chosen`` and ``rejected`` of ``count`` passages, of so many words."""
    words = " ".join(passages()).split()
    rows = []
    for start in range(0, count * (before + after), before + after):
        go_on = words[start + before : start + before + after]
        prompt = " ".join(words[start : start + before])
        rows.append(
            {"prompt": prompt, "chosen": " " + " ".join(go_on), "rejected": " " + " ".join(go_on[::-1])}
        )
    return rows


def _epoch(
    setting: Setting,
    objective: str,
    rows: list[dict[str, str]],
    peer: str,
    fine_tune: Callable[..., dict[str, Any]],
) -> Figure:
    folder = setting.folder / objective
    folder.mkdir()
    data, store = folder / "rows.jsonl", folder / "store"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw: dict[str, Any] = {
        "model": {"name_or_path": setting.model, "dtype": setting.dtype},
        "data": {"dataset": str(data), "eval_fraction": 0.0},
        "objective": {"name": objective},
        "train": {"num_train_epochs": 3, "eval_steps": 10**6, "save_steps": 10**6},
    }
    embedding = seconds(lambda: embed(parse_recipe(raw), store, backbone=setting.backbone))
    recipe = parse_recipe({**raw, "data": {"store": str(store), "eval_fraction": 0.0}})
    path = folder / "run"

    def ours() -> float:
        train(recipe, path)
        return sum(epoch_seconds(path))

    def theirs() -> float:
        return fine_tune(rows, 3e-4, 1, _BATCH, model=setting.model, dtype=setting.dtype)["seconds"]

    values = alternate({OURS: ours, peer: theirs}, 1, {})
    values[OURS] = epoch_seconds(path)
    opened = StateStore.open(store)
    head, tokens = HeadWork(opened.make_head(recipe.head)), opened.num_tokens
    minibatches = -(-tokens // recipe.objective.minibatch_tokens)
    work = [*head.update(tokens, minibatches), Work(0, tokens * head.state_bytes)]
    first = embedding + values[OURS][0]
    facts = {
        "rows": len(rows),
        "tokens": tokens,
        "first_epoch_with_embedding": median([first]),
        "first_epoch_ratio": median([median(values[peer]) / first]),
    }
    return Figure(f"{objective} epoch", "s", values, setting.limits.seconds(work), facts)


def epoch_seconds(run_path: Path) -> list[float]:
    """Seconds of the steps of every epoch of a run."""
    rows = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    spent: dict[int, float] = {}
    for row in rows:
        if "loss" in row and "epoch" in row:
            number = math.ceil(row["epoch"] - 1e-9)
            spent[number] = spent.get(number, 0.0) + row["seconds"]
    return [spent[number] for number in sorted(spent)]
