"""One online step of ours against one of TRL's ``GRPOTrainer`` with LoRA (r = 16, all linear layers), turn and turn about.

Both sides get the same prompts, group size, token limit, reward and temperature. Ours runs the recipe quickstart, all its inner
epochs included; TRL runs its defaults (one pass), without a KL term and without gradient checkpointing. Our steps are run from
a callback of TRL's trainer, whose clock stands still meanwhile. The first step of each is not counted. A full run on a CPU also
takes steps of ours with the backbone loaded otherwise (`common.VARIANTS`).

Limit: prompts and tokens of the rollout (see the decode stage), and `limits.HeadWork.update` times the inner epochs run.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from typing import Any

from common import OURS, Figure, Setting, median
from limits import HeadWork, ModelWork
from lora import lora_config, quiet, settings

from tea_rl import load_backbone, load_recipe
from tea_rl.evaluation.evaluate import score_texts
from tea_rl.objectives.forking import forking_tokens
from tea_rl.training.drawn import Drawn
from tea_rl.training.online import OnlineTrainer, prepare_prompts
from tea_rl.training.progress import Listener
from tea_rl.training.run_directory import RunDirectory


def run(setting: Setting) -> list[Figure]:
    """Measure the stage."""
    sizes = setting.pick(
        {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 16},
        {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 32},
    )
    with ExitStack() as stack:
        sides = [
            Ours(
                setting,
                sizes,
                stack.enter_context(RunDirectory.create(setting.folder / f"online-{number}")),
                options,
            )
            for number, options in enumerate([{}, *setting.variants.values()])
        ]
        theirs = grpo_steps(setting, sides, setting.pick(1, 2))
    ours, limit = sides[0], sides[0].limit()
    steps = ours.steps[1:]  # the first warmed up
    total = [row["seconds"] for row in steps]
    update = median([row["update_seconds"] for row in steps])
    facts = {
        **sizes,
        "generate_seconds": median([row["generate_seconds"] for row in steps]),
        "update_seconds": update,
        "update_share": round(update / median(total), 4),
        "inner_epochs": median([row["inner_epochs"] for row in steps]),
    }
    figure = Figure("step", "s", {OURS: total, "trl_grpo_lora": theirs}, limit, facts)
    varied = zip(setting.variants, sides[1:], strict=True)
    return [
        figure,
        *(figure.variant(name, [row["seconds"] for row in side.steps[1:]]) for name, side in varied),
    ]


class Ours(Listener):
    """Our side: steps of `OnlineTrainer` over the same few prompts, all of them in every step.

    Attributes:
        steps: what the trainer logged of every step so far, and the seconds of its parts.
    """

    def __init__(
        self, setting: Setting, sizes: dict[str, int], directory: RunDirectory, options: dict[str, Any]
    ) -> None:
        self.limits = setting.limits
        texts = [
            prompt.text for prompt in prepare_prompts(load_recipe("quickstart"), setting.backbone)[0].prompts
        ]
        changes = {
            "model.name_or_path": setting.model,
            "model.dtype": setting.dtype,
            **{f"model.{name}": value for name, value in options.items()},
            "data.prompts": texts[: sizes["prompts_per_step"]],
            "data.eval_fraction": 0.0,
            "rollout.early_steps": 0,  # all completions are of the same length, as the other side's are
            **{f"rollout.{name}": value for name, value in sizes.items()},
        }
        recipe = load_recipe("quickstart", [f"{name}={json.dumps(value)}" for name, value in changes.items()])
        self.trainer = OnlineTrainer(recipe, directory, self, resume=False)
        self.steps: list[dict[str, Any]] = []
        generate = self.trainer._generate

        def kept_generate(*args: Any) -> Drawn:
            self.newest = generate(*args)
            return self.newest

        self.trainer._generate = kept_generate
        self.trainer.clock.start()  # what `--profile` reads: values of tokens belong to the update
        self.updated = 0.0

    def on_step(self, row: dict[str, Any]) -> None:
        """Keep what the trainer tells of a step."""
        stages = {stage["name"]: stage["seconds"] for stage in self.trainer.clock.profile()["stages"]}
        spent, self.updated = stages["update"] - self.updated, stages["update"]
        self.steps.append({**row, "generate_seconds": self.newest.seconds, "update_seconds": spent})

    def step(self) -> None:
        """Roll out, reward, advantage, update."""
        self.trainer._step(len(self.steps) + 1)

    def limit(self) -> float:
        """Least seconds of the newest step."""
        model, head = ModelWork(self.trainer.backbone), HeadWork(self.trainer.head)
        objective, tokens = self.trainer.recipe.objective, self.newest.rollout.tokens
        prompts = [len(ids) for ids in self.trainer.training_prompts.token_ids]
        lengths = self.newest.rollout.lengths
        rollout = [*model.prefill(prompts), *model.decode(prompts, lengths), *head.decode(lengths)]
        learnt = forking_tokens(tokens.entropy, objective.top_entropy_quantile)
        minibatches = -(-len(learnt) // objective.minibatch_tokens)
        one_epoch = head.update(len(tokens.state_ids[learnt].unique()), minibatches)
        return self.limits.seconds(rollout) + self.steps[-1]["inner_epochs"] * self.limits.seconds(one_epoch)


def grpo_steps(setting: Setting, sides: list[Ours], count: int) -> list[float]:
    """Seconds of ``count`` steps of TRL after one that warms up; after each of them comes one of each of our sides."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    own = sides[0].trainer
    prompts, rollout = own.training_prompts.prompts, own.recipe.rollout
    spent: list[float] = []
    clock = {"from": 0.0}

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["from"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            spent.append(time.perf_counter() - clock["from"])
            for ours in sides:
                ours.step()
            clock["from"] = time.perf_counter()

    def reward(completions: list[str], place: list[int], **_: Any) -> list[float]:
        return score_texts(own.rewards, [prompts[at] for at in place], completions).total

    backbone = load_backbone(setting.model, dtype=setting.dtype, plain=True)  # LoRA changes its modules
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **settings(folder, backbone.dtype),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=count + 1,
            per_device_train_batch_size=rollout.prompts_per_step * rollout.num_generations,
            num_generations=rollout.num_generations,
            max_completion_length=rollout.max_completion_length,
            temperature=rollout.temperature,
            beta=0.0,
        )
        texts = [prompt.rendered for prompt in prompts]
        trainer = GRPOTrainer(
            model=backbone.model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts, "place": list(range(len(texts)))}),
            processing_class=backbone.tokenizer,
            peft_config=lora_config(),
            callbacks=[Turns()],
        )
        quiet(trainer).train()
    return spent[1:]
