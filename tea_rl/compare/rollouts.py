"""One set of completions of the original model, with rewards: what dpo, kto and sft learn from.

It is generated once a comparison and seed, by the first job that needs it, with our decode loop; every job that uses it
counts the time and the reward calls as its own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tea_rl.compare.trained import Start
from tea_rl.evaluation.evaluate import score
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import generate
from tea_rl.training.files import atomic_write_text, disk_errors
from tea_rl.training.online import decode_settings

#: Separates these random numbers from those of our own training.
_STREAM = 2**31 + 1


class Rollouts(BaseModel):
    """Groups of completions, in the order of the training prompts.

    Attributes:
        prompt_ids: token ids of each prompt.
        completion_ids: of each prompt, token ids of each completion, as sampled.
        rewards: of each prompt, the reward of each completion.
        seconds: generating and scoring took.
    """

    model_config = ConfigDict(extra="forbid")

    prompt_ids: list[list[int]]
    completion_ids: list[list[list[int]]]
    rewards: list[list[float]]
    seconds: float

    @property
    def reward_calls(self) -> int:
        """Completions that were scored."""
        return sum(map(len, self.rewards))

    def pairs(self) -> list[dict[str, Any]]:
        """Best and worst of each group, where they differ: rows of token ids for DPO."""
        rows = []
        for prompt, texts, rewards in zip(self.prompt_ids, self.completion_ids, self.rewards, strict=True):
            best, worst = (pick(range(len(rewards)), key=rewards.__getitem__) for pick in (max, min))
            if rewards[best] > rewards[worst]:
                rows.append({"prompt_ids": prompt, "chosen_ids": texts[best], "rejected_ids": texts[worst]})
        return rows

    def labelled(self) -> list[dict[str, Any]]:
        """Every completion, desirable where its reward is above its group's mean, undesirable below: rows for KTO."""
        rows = []
        for prompt, texts, rewards in zip(self.prompt_ids, self.completion_ids, self.rewards, strict=True):
            middle = sum(rewards) / len(rewards)
            rows += [
                {"prompt_ids": prompt, "completion_ids": text, "label": reward > middle}
                for text, reward in zip(texts, rewards, strict=True)
                if reward != middle
            ]
        return rows

    def best(self) -> list[dict[str, Any]]:
        """The best completion of each group: rows for SFT, the loss on the completion alone."""
        rows = []
        for prompt, texts, rewards in zip(self.prompt_ids, self.completion_ids, self.rewards, strict=True):
            text = texts[max(range(len(rewards)), key=rewards.__getitem__)]
            rows.append({"input_ids": prompt + text, "labels": [-100] * len(prompt) + text})
        return rows


def shared_rollouts(start: Start, seed: int, path: Path) -> Rollouts:
    """Those of the comparison: read, or generated and stored for the jobs that follow.

    Raises:
        TeaError: if they cannot be stored.
    """
    try:
        return Rollouts.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        rollouts = _generate(start, seed)
    with disk_errors(f"write {path}", "run the command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, rollouts.model_dump_json() + "\n")
    return rollouts


def _generate(start: Start, seed: int) -> Rollouts:
    """As many prompts at a time as in a step of training: a reward may compare the texts it is given together."""
    began = time.perf_counter()
    rollout = start.recipe.rollout
    original = TeaHead.for_backbone(start.backbone, HeadConfig(num_members=1, hidden_sizes=[1]))
    settings = decode_settings(start.recipe, rollout.num_generations)
    completions: list[list[list[int]]] = []
    rewards: list[list[float]] = []
    for first in range(0, len(start.training), rollout.prompts_per_step):
        keys = range(first, min(first + rollout.prompts_per_step, len(start.training)))
        prompts = start.training.take(keys)
        drawn = generate(start.backbone, original, prompts.token_ids, settings, (seed, _STREAM), keys)
        totals = score(start.rewards, prompts.prompts, drawn).total
        ids = [part.tolist() for part in drawn.tokens.actions.split(drawn.lengths.tolist())]
        for place in range(0, len(ids), rollout.num_generations):
            completions.append(ids[place : place + rollout.num_generations])
            rewards.append(totals[place : place + rollout.num_generations])
    return Rollouts(
        prompt_ids=start.training.token_ids,
        completion_ids=completions,
        rewards=rewards,
        seconds=time.perf_counter() - began,
    )


def rows_for(trainer: str, rollouts: Rollouts) -> list[dict[str, Any]]:
    """What a trainer learns from: see `Rollouts`."""
    if trainer == "dpo":
        return rollouts.pairs()
    return rollouts.labelled() if trainer == "kto" else rollouts.best()
