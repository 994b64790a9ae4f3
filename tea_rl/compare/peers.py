"""The peers' own code: TRL's trainers with PEFT's adapters, given our prompts and rewards. Nothing of theirs is re-implemented.

The settings are TRL's own, except for what must agree on both sides (sampling, group size, seed) and for what makes the
peers faster here: no gradient checkpointing, no KL term in grpo and rloo (it would cost a second forward pass), bfloat16
where the recipe says so. Completions to learn from are handed over as token ids, exactly as they were sampled.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tea_rl.backbone import load_backbone
from tea_rl.compare.course import Course
from tea_rl.compare.jobs import ADAPTER_NAME, CHECKPOINT_NAME, Job
from tea_rl.compare.measure import BaseModel, adapter_base, separate_base
from tea_rl.compare.methods import ADAPTERS
from tea_rl.compare.results import CurvePoint
from tea_rl.compare.rollouts import Rollouts, rows_for, shared_rollouts
from tea_rl.compare.trained import Start, Trained, folder_bytes
from tea_rl.data.prompts import short
from tea_rl.errors import TeaError
from tea_rl.evaluation.evaluate import PromptSet
from tea_rl.rollout.decode import ending_tokens

#: Trainers that generate are stopped by time; so many steps they never reach.
_ENDLESS = 1_000_000


def train_peer(job: Job, start: Start, earlier: list[CurvePoint]) -> Trained:
    """Train with a TRL trainer until its data or its time is used up.

    Args:
        job: method, learning rate and seed.
        start: model, prompts and rewards.
        earlier: the curve so far, if the job's checkpoint is to be continued; else empty.

    Raises:
        TeaError: prompts or rollouts that the trainer cannot learn from.
    """
    backbone, full = start.backbone, job.method.adapter == "full"
    ending = ending_tokens(backbone, tuple(start.recipe.rollout.stop)).nonzero().flatten().tolist()
    backbone.model.generation_config.eos_token_id = ending
    watch = _Watch(saves=not full)
    if job.method.trainer in ("grpo", "rloo"):
        trainer = _online_trainer(job, start, watch)
    else:
        rollouts = shared_rollouts(start, job.seed, job.rollouts_path)
        trainer = _rollout_trainer(job, start, rollouts, watch)
        if not earlier:
            watch.reward_calls, watch.seconds_before = (
                rollouts.reward_calls,
                watch.seconds_before + rollouts.seconds,
            )
    course = watch.begin(start.course(trainer.model, earlier), trainer.model)
    checkpoint = job.checkpoint() if earlier else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model = trainer.model
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if full:
        size = sum(parameter.numel() for parameter in model.parameters()) * backbone.dtype.itemsize
        return Trained(model.to(backbone.dtype), lambda: _second_base(start), course, trainable, size)
    folder = job.folder / ADAPTER_NAME
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_embedding_layers=False)
    return Trained(model, lambda: adapter_base(model), course, trainable, folder_bytes(folder))


class _Watch(TrainerCallback):
    """Runs a course along a trainer.

    Attributes:
        reward_calls: completions scored so far.
        seconds_before: training time spent before the trainer starts.
    """

    def __init__(self, saves: bool) -> None:
        self.reward_calls, self.seconds_before, self._saves = 0, 0.0, saves

    def begin(self, course: Course, model: Any) -> Course:
        """Take the course of the run to come."""
        self._course, self._model = course, model
        self.reward_calls = max(self.reward_calls, course.reward_calls)
        return course

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._course.begin()
        self._course.add_seconds(self.seconds_before)
        self._model.train()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._course.after_step(state.global_step, self.reward_calls):
            control.should_training_stop = True
            control.should_save = self._saves  # to be continued, should there be time in the end
        self._model.train()
        return control


def _arguments(job: Job, start: Start) -> dict[str, Any]:
    """Arguments that every trainer gets."""
    train, dtype = start.recipe.train, start.backbone.dtype
    return {
        "output_dir": str(job.folder / CHECKPOINT_NAME),
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",  # how long it trains is not known; no warm-up, as by TRL's default
        "max_grad_norm": train.max_grad_norm,
        "seed": job.seed,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": start.backbone.device.type == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def adapter_config(adapter: str) -> Any:
    """PEFT's configuration of an adapter; None for training every weight."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    kinds = {
        "lora": LoraConfig,
        "ia3": IA3Config,
        "prompt-tuning": PromptTuningConfig,
        "prefix-tuning": PrefixTuningConfig,
        "p-tuning": PromptEncoderConfig,
    }
    return None if adapter == "full" else kinds[adapter](task_type="CAUSAL_LM", **ADAPTERS[adapter])


def _online_trainer(job: Job, start: Start, watch: _Watch) -> Any:
    """GRPO or RLOO: it generates, and asks for rewards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    kind, configuration = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[
        str(job.method.trainer)
    ]
    rollout = start.recipe.rollout
    args = configuration(
        **_arguments(job, start),
        max_steps=_ENDLESS,
        per_device_train_batch_size=rollout.prompts_per_step * rollout.num_generations,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        beta=0.0,
    )
    texts = _prompt_texts(start.training, start.backbone.tokenizer)
    return kind(
        model=start.backbone.model,
        reward_funcs=_reward_function(start, watch),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts, "place": list(range(len(texts)))}),
        processing_class=start.backbone.tokenizer,
        peft_config=adapter_config(str(job.method.adapter)),
        callbacks=[watch],
    )


def _reward_function(start: Start, watch: _Watch) -> Callable[..., list[float]]:
    """The recipe's reward in TRL's form; it sees the question as our own training does, not as it was rendered."""

    def reward(completions: list[str], place: list[int], **_: Any) -> list[float]:
        prompts = [start.training.prompts[at] for at in place]
        names = sorted({name for prompt in prompts for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        watch.reward_calls += len(completions)
        return start.rewards([prompt.text for prompt in prompts], completions, columns).total

    return reward


def _prompt_texts(prompts: PromptSet, tokenizer: Any) -> list[str]:
    """Texts that TRL's way of tokenising turns into our token ids: it adds special tokens, which a chat template brings too."""
    texts = []
    for prompt, ids in zip(prompts.prompts, prompts.token_ids, strict=True):
        candidates = [prompt.rendered, prompt.rendered.removeprefix(tokenizer.bos_token or "")]
        same = [text for text in candidates if list(tokenizer(text=text)["input_ids"]) == ids]
        if not same:
            raise TeaError(
                f"TRL would tokenise the prompt {short(prompt.rendered)} otherwise than it is read here; compare with dpo, kto or "
                "sft, which take token ids"
            )
        texts.append(same[0])
    return texts


def _rollout_trainer(job: Job, start: Start, rollouts: Rollouts, watch: _Watch) -> Any:
    """DPO, KTO or SFT: it learns from completions of the original model."""
    from datasets import Dataset
    from trl import DPOConfig, KTOConfig, SFTConfig, SFTTrainer

    name, full = str(job.method.trainer), job.method.adapter == "full"
    rows = rows_for(name, rollouts)
    if not rows:
        raise TeaError(
            f"{job.method.name} has nothing to learn from: every completion of a prompt earned the same reward; use a reward that "
            "tells completions apart, or raise rollout.num_generations"
        )
    dataset = Dataset.from_list(rows).shuffle(seed=job.seed)
    kind, configuration, more = {
        "dpo": (_dpo_trainer(), DPOConfig, {"precompute_ref_log_probs": full}),
        "kto": (_kto_trainer(), KTOConfig, {}),
        "sft": (SFTTrainer, SFTConfig, {}),
    }[name]
    # A pair holds two completions, and a group of them is a step's worth of prompts.
    batch = start.recipe.rollout.prompts_per_step * (2 if name == "kto" else 1)
    args = configuration(
        **_arguments(job, start),
        **more,
        num_train_epochs=start.recipe.compare.num_train_epochs,
        per_device_train_batch_size=min(batch, len(rows)),
        max_length=None,
    )
    if full:
        # Weights in bfloat16 would swallow the small steps of full fine-tuning: mixed precision, as TRL itself loads models.
        start.backbone.model.float().requires_grad_(True)
    began = time.perf_counter()
    trainer = kind(
        model=start.backbone.model,
        args=args,
        train_dataset=dataset,
        processing_class=start.backbone.tokenizer,
        peft_config=adapter_config(str(job.method.adapter)),
        callbacks=[watch],
    )
    if full:  # it has computed the reference log-probabilities
        watch.seconds_before += time.perf_counter() - began
    return trainer


def _dpo_trainer() -> type[Any]:
    """TRL's DPO trainer for rows of token ids: nothing is left to tokenise, and no end is put behind a cut completion."""
    from trl import DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    return Trainer


def _kto_trainer() -> type[Any]:
    """TRL's KTO trainer for rows of token ids; each row gets the completion of its neighbour in the batch, as KTO's KL needs."""
    from trl import KTOTrainer

    class Trainer(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *more: Any) -> Any:
            ids, size = dataset["completion_ids"], args.per_device_train_batch_size
            rotated = [
                row
                for at in range(0, len(ids), size)
                for row in [ids[at : at + size][-1], *ids[at : at + size][:-1]]
            ]
            return dataset.add_column("KL_completion_ids", rotated)

    return Trainer


def _second_base(start: Start) -> BaseModel:
    """The original model beside one whose every weight was trained."""
    return separate_base(load_backbone(**start.recipe.model.model_dump(), plain=True).model)
