"""Held-out evaluation of a head: reward sampled and greedy, KL, diversity and fluency under the original model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tea_rl.backbone import Backbone
from tea_rl.data.prompts import Prompt
from tea_rl.evaluation.metrics import distinct_n, mean
from tea_rl.head.layer import TeaHead
from tea_rl.rewards import RewardBatch, Rewards
from tea_rl.rollout import DecodeSettings, Rollout, generate

#: Completions decoded together: at least this many, and as many as have this number of tokens at most.
EVAL_BATCH, EVAL_TOKENS = 64, 2048


@dataclass
class PromptSet:
    """Prompts with their token ids, side by side."""

    prompts: list[Prompt]
    token_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, index: Sequence[int]) -> PromptSet:
        """The prompts at ``index``."""
        return PromptSet([self.prompts[i] for i in index], [self.token_ids[i] for i in index])


@dataclass
class Sample:
    """One completion of a prompt with its weighted reward."""

    prompt: str
    completion: str
    reward: float


@dataclass
class Evaluation:
    """Metrics (``eval_...``), the sampled completions, first generation of each prompt, and the reward of every sampled one."""

    metrics: dict[str, float]
    samples: list[Sample]
    rewards: list[float] = field(default_factory=list)


def score(
    rewards: Rewards, prompts: Sequence[Prompt], generated: Rollout, rows: Sequence[int] | None = None
) -> RewardBatch:
    """Rewards of a rollout's completions, or of those at ``rows``."""
    return rewards(*reward_inputs(prompts, generated, rows))


def reward_inputs(
    prompts: Sequence[Prompt], generated: Rollout, rows: Sequence[int] | None = None
) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """What a reward is told of a rollout's completions, or of those at ``rows``: prompts, completions, the prompts' columns."""
    rows = range(len(generated.texts)) if rows is None else rows
    answered = generated.prompt_index.tolist()
    return _inputs([prompts[answered[row]] for row in rows], [generated.texts[row] for row in rows])


def score_texts(rewards: Rewards, prompts: Sequence[Prompt], completions: Sequence[str]) -> RewardBatch:
    """Rewards of completions, each with its prompt's columns."""
    return rewards(*_inputs(prompts, completions))


def _inputs(
    prompts: Sequence[Prompt], completions: Sequence[str]
) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    names = {name for prompt in prompts for name in prompt.columns}
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}
    return [prompt.text for prompt in prompts], list(completions), columns


def evaluate(
    backbone: Backbone,
    head: TeaHead,
    prompts: PromptSet,
    rewards: Rewards,
    settings: DecodeSettings,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a head at its current strength and desired return.

    The random numbers depend only on ``seed``, the prompt and the generation, so that evaluations of one run differ by
    the head alone.

    Returns:
        metrics ``eval_reward`` (sampled, mean over completions), ``eval_reward/<name>``, ``eval_reward_greedy``,
        ``eval_kl`` (exact, nats a token, mean over tokens), ``eval_distinct_2`` (over all samples), ``eval_base_nll``
        (surprise of the samples under the original model, nats a token, mean over completions),
        ``eval_completion_length`` (tokens).
    """
    terms: dict[str, list[float]] = {}
    totals, greedy, texts, kls, surprises, lengths, samples = [], [], [], [], [], [], []
    for part, generated in _rollouts(backbone, head, prompts, settings, seed):
        is_greedy = (
            torch.arange(len(generated.texts)) % (settings.num_generations + 1) == settings.num_generations
        )
        sampled = (~is_greedy).nonzero().flatten().tolist()
        # Two calls: a reward may compare the texts it is given together.
        batch = score(rewards, part.prompts, generated, sampled)
        best = score(rewards, part.prompts, generated, is_greedy.nonzero().flatten().tolist())
        # NaN: a worker did not answer in time.
        greedy += [value for value in best.total if not math.isnan(value)]
        totals += [value for value in batch.total if not math.isnan(value)]
        of_samples = [generated.texts[row] for row in sampled]
        texts += of_samples
        for name, values in batch.terms.items():
            terms.setdefault(name, []).extend(value for value in values if value is not None)
        kls += generated.tokens.kl[~is_greedy[generated.tokens.rows.cpu()]].tolist()
        surprises += generated.mean_over_rows(-generated.tokens.base_logps)[sampled].tolist()
        lengths += generated.lengths[sampled].tolist()
        every = slice(None, None, settings.num_generations)
        samples += [
            Sample(*row)
            for row in zip([p.text for p in part.prompts], of_samples[every], batch.total[every], strict=True)
        ]
    metrics = {
        "eval_reward": mean(totals),
        **{f"eval_reward/{name}": mean(values) for name, values in terms.items()},
        "eval_reward_greedy": mean(greedy),
        "eval_kl": mean(kls),
        "eval_distinct_2": distinct_n(texts, 2),
        "eval_base_nll": mean(surprises),
        "eval_completion_length": mean(lengths),
    }
    return Evaluation(metrics, samples, totals)


def _rollouts(
    backbone: Backbone, head: TeaHead, prompts: PromptSet, settings: DecodeSettings, seed: int
) -> Iterator[tuple[PromptSet, Rollout]]:
    """Batches of prompts with their sampled completions and, last of each prompt, its greedy one."""
    settings = replace(settings, num_generations=settings.num_generations + 1, greedy_last=True)
    size = max(1, max(EVAL_BATCH, EVAL_TOKENS // settings.max_new_tokens) // settings.num_generations)
    for start in range(0, len(prompts), size):
        keys = range(start, min(start + size, len(prompts)))
        part = prompts.take(keys)
        yield part, generate(backbone, head, part.token_ids, settings, (seed, _EVAL_STREAM), keys)


#: Separates evaluation's random numbers from training's, whose keys hold the step here.
_EVAL_STREAM = 2**31
