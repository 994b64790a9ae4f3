"""LoRA through the peers' own code (TRL's trainers + PEFT), for every comparison of the benchmarks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def lora_config(rank: int = 16) -> Any:
    """LoRA on all linear layers."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def lora_model(rank: int = 16, model: str = MODEL, dtype: str = "auto") -> tuple[Any, Any]:
    """A model of its own with LoRA on all linear layers, and its tokenizer."""
    from peft import get_peft_model

    from tea_rl import load_backbone

    backbone = load_backbone(model, dtype=dtype, plain=True)
    return get_peft_model(backbone.model, lora_config(rank)), backbone.tokenizer


def settings(folder: str, dtype: Any, **more: Any) -> dict[str, Any]:
    """Arguments that every trainer gets; what makes the peers faster here is on: no checkpointing, their fastest format."""
    import torch

    return {
        "output_dir": folder,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": dtype is torch.bfloat16,
        "gradient_checkpointing": False,
        **more,
    }


def quiet(trainer: Any) -> Any:
    """The trainer without its printed rows; the figures are the output here."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _never(model: Any, seconds: float, epoch: int) -> bool:
    return False


def sft(
    rows: list[dict[str, str]],
    learning_rate: float,
    epochs: int,
    batch_size: int,
    after_epoch: Callable[[Any, float, int], bool] = _never,
    **load: str,
) -> dict[str, Any]:
    """Fine-tune LoRA r=16 on prompt/completion rows and return seconds of training and the model.

    Args:
        rows: ``{"prompt": ..., "completion": ...}``; the loss is on the completion alone.
        after_epoch: called with the model, the seconds of training so far (its own time is not counted) and the epoch;
            True ends the run.
        load: ``model`` and ``dtype`` of `lora_model`.
    """
    from trl import SFTConfig, SFTTrainer

    return _fine_tune(SFTTrainer, SFTConfig, rows, learning_rate, epochs, batch_size, after_epoch, load)


def dpo(
    rows: list[dict[str, str]], learning_rate: float, epochs: int, batch_size: int, **load: str
) -> dict[str, Any]:
    """The same with ``DPOTrainer`` on ``{"prompt", "chosen", "rejected"}``; the adapter switched off is the reference."""
    from trl import DPOConfig, DPOTrainer

    return _fine_tune(DPOTrainer, DPOConfig, rows, learning_rate, epochs, batch_size, _never, load)


def _fine_tune(
    trainer_class: Any,
    config_class: Any,
    rows: list[dict[str, str]],
    learning_rate: float,
    epochs: int,
    batch_size: int,
    after_epoch: Callable[[Any, float, int], bool],
    load: dict[str, str],
) -> dict[str, Any]:
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback

    disable_progress_bars()
    model, tokenizer = lora_model(**load)
    clock = {"started": 0.0, "paused": 0.0}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["started"] = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            control.should_training_stop |= after_epoch(
                model, now - clock["started"] - clock["paused"], round(state.epoch)
            )
            model.train()
            clock["paused"] += time.perf_counter() - now
            return control

    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            **settings(folder, model.get_base_model().dtype),
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            max_length=512,
        )
        trainer = trainer_class(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        quiet(trainer).train()
    return {"model": model, "seconds": time.perf_counter() - clock["started"] - clock["paused"]}


def row_accuracy(model: Any, tokenizer: Any, rows: list[dict[str, str]], batch_size: int = 50) -> float:
    """Share of rows whose whole completion the model ranks first, token by token, given what comes before."""
    import torch

    right = 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [tokenizer(row["prompt"]).input_ids for row in part]
        answers = [tokenizer(row["completion"], add_special_tokens=False).input_ids for row in part]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            mask[i, : len(p) + len(a)] = 1
        model.eval()
        with torch.no_grad():
            best = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            right += best[i, len(p) - 1 : len(p) + len(a) - 1].tolist() == a
    return right / len(rows)


def perplexity(model: Any, tokenizer: Any, texts: list[str], max_length: int = 256) -> float:
    """Perplexity of plain texts, by token."""
    import math

    import torch
    from torch.nn import functional as F

    total, count = 0.0, 0
    model.eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[:max_length]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def unrelated_english(count: int = 12) -> list[str]:
    """Passages of the Python language reference, which ships with Python."""
    from pydoc_data.topics import topics

    return [topics[name][:1200] for name in sorted(topics)[:: max(1, len(topics) // count)]][:count]
