"""Measure any causal language model on held-out prompts: the same code for every method of a comparison.

The model is whatever ``transformers`` can ``generate`` from: the original one, a PEFT model, or one with a TEA head
installed. What it is compared with is the base model, reached through a context manager (`BaseModel`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tea_rl.compare.forgetting import TASKS, measure_forgetting
from tea_rl.compare.results import FrontierPoint, KlEstimate, Metrics, Sample
from tea_rl.compare.sampling import BaseModel, Completions, Scores, sample, score_completions
from tea_rl.data.prompts import Prompt
from tea_rl.evaluation.evaluate import PromptSet, score_texts
from tea_rl.evaluation.metrics import compressed_share, distinct_n, mean, self_repetition
from tea_rl.rewards import RewardBatch, RewardSum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tea_rl.backbone import Backbone
    from tea_rl.head.layer import TeaHead
    from tea_rl.recipe import Recipe

#: Metrics that a reward term pays for are not independent of it.
_PAID_FOR = {"repetition": ("self_repetition",), "echo": ("distinct_2", "compressed_share")}


@dataclass(frozen=True)
class MeasureSettings:
    """How to sample and what to measure.

    Attributes:
        num_generations: sampled completions of each prompt, beside a greedy one.
        max_new_tokens: longest completion.
        temperature: divides the logits; KL and gains are those of the policies at it.
        ending_token_ids: tokens that end a completion (see `tea_rl.rollout.decode.ending_tokens`).
        pad_token_id: padding.
        best_of: of so many samples the one with most reward counts; 1 everywhere but in ``best-of-n``.
        seed: of the sampling.
        num_samples: completions kept to be read, one a prompt.
        forgetting: measure perplexities on text that was not trained on.
        forgetting_tasks: reasoning-gym tasks for that.
    """

    num_generations: int
    max_new_tokens: int
    temperature: float
    ending_token_ids: tuple[int, ...]
    pad_token_id: int
    best_of: int = 1
    seed: int = 0
    num_samples: int = 24
    forgetting: bool = True
    forgetting_tasks: tuple[str, ...] = TASKS


@dataclass(frozen=True)
class Measured:
    """What `measure` returns; the fields of `SeedResult` of the same name."""

    metrics: Metrics
    samples: list[Sample]
    generation_tokens_per_second: float


def measure_settings(recipe: Recipe, backbone: Backbone, **changes: Any) -> MeasureSettings:
    """The settings of a recipe: its rollout's sampling, ``train.eval_generations`` completions and its seed."""
    from tea_rl.rollout.decode import ending_tokens

    written = json.dumps(recipe.model_dump(mode="json", include={"data", "env"}))
    settings = MeasureSettings(
        num_generations=recipe.train.eval_generations,
        max_new_tokens=recipe.rollout.max_completion_length,
        temperature=recipe.rollout.temperature,
        ending_token_ids=tuple(
            ending_tokens(backbone, tuple(recipe.rollout.stop)).nonzero().flatten().tolist()
        ),
        pad_token_id=backbone.pad_token_id,
        seed=recipe.train.seed,
        forgetting_tasks=tuple(task for task in TASKS if task not in written),
    )
    return replace(settings, **changes)


def adapter_base(model: Any) -> BaseModel:
    """The base of a PEFT model."""

    @contextmanager
    def base() -> Iterator[Any]:
        with model.disable_adapter():
            yield model

    return base


def separate_base(model: Any) -> BaseModel:
    """A base model that lies in memory beside the trained one, or is the model itself."""
    return lambda: nullcontext(model)


def evaluate_reward(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    rewards: RewardSum,
    settings: MeasureSettings,
) -> float:
    """Mean reward of sampled completions (no greedy ones): a point of a training curve.

    Draws from a generator of its own: torch's global one is left as it was. Leaves the model in evaluation mode.
    """
    return mean(_Samples(model, tokenizer, prompts, rewards, settings).batch.total)


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseModel | None,
    prompts: PromptSet,
    rewards: RewardSum,
    settings: MeasureSettings,
    *,
    head: TeaHead | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Measured:
    """Every metric of a trained model, and completions to read.

    Args:
        model: the policy, in evaluation mode afterwards.
        tokenizer: its tokenizer; pads on the left.
        base: the base model; None where ``model`` is it.
        prompts: held-out prompts.
        rewards: scores the samples; the greedy completions are scored in a call of their own.
        head: the TEA head installed in ``model``, for the disagreement of its members.
        notify: hears what was left out, and why.
    """
    drawn = _Samples(model, tokenizer, prompts, rewards, settings)
    greedy = _Samples(
        model, tokenizer, prompts, rewards, replace(settings, num_generations=1, best_of=1), greedy=True
    )
    scores = score_completions(model, base, prompts.token_ids, drawn.completions, settings.temperature, head)
    figures = {
        "surprise": mean([row.mean().item() for row in scores.surprises]),
        "distinct_1": distinct_n(drawn.texts, 1),
        "distinct_2": distinct_n(drawn.texts, 2),
        "self_repetition": mean([self_repetition(text) for text in drawn.texts]),
    }
    independent = {
        "surprise": figures["surprise"],
        "distinct_2": figures["distinct_2"],
        "self_repetition": figures["self_repetition"],
        "compressed_share": compressed_share(drawn.texts),
    }
    for paid in (name for term in rewards.names for name in _PAID_FOR.get(term, ())):
        independent.pop(paid, None)
    forgetting = None
    if settings.forgetting:
        forgetting = measure_forgetting(model, tokenizer, settings.forgetting_tasks, notify)
    metrics = Metrics(
        reward_sampled=_by_prompt(drawn.batch.total, len(prompts)),
        reward_greedy=greedy.batch.total,
        terms=_term_means(drawn.batch),
        independent=independent,
        kl=_kl(scores, drawn.completions, settings.best_of),
        length=mean([float(len(ids)) for ids in drawn.completions.token_ids]),
        forgetting=forgetting,
        disagreement=_disagreement(head, scores.states),
        **figures,
    )
    samples = _to_read(tokenizer, drawn, None if settings.best_of > 1 else scores, settings)
    return Measured(metrics, samples, drawn.tokens_per_second)


@torch.no_grad()
def measure_frontier(
    head: TeaHead,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    rewards: RewardSum,
    settings: MeasureSettings,
    strengths: Sequence[float],
    known: Sequence[FrontierPoint] = (),
    is_time_left: Callable[[float], bool] = lambda seconds: True,
) -> list[FrontierPoint]:
    """Reward and KL at each strength of an installed head, whose own strength is restored.

    Args:
        head: installed in ``model``.
        model, tokenizer, prompts, rewards, settings: as for `measure`.
        strengths: to be measured.
        known: points that have been measured already, with the same prompts and settings; all of them are returned.
        is_time_left: asked before each, with the seconds that the longest one took so far; what is not measured is left out.

    Returns:
        points by strength.
    """
    trained_at = head.strength
    points = {point.strength: point for point in known}
    longest = 0.0
    try:
        for strength in strengths:
            if strength in points or not is_time_left(longest):
                continue
            began = time.perf_counter()
            head.strength = strength
            drawn = _Samples(model, tokenizer, prompts, rewards, settings)
            kl = 0.0  # at strength 0 it is the base model
            if strength != 0:
                scores = score_completions(
                    model, None, prompts.token_ids, drawn.completions, settings.temperature, head
                )
                kl = torch.cat(scores.kl).mean().item()
            points[strength] = FrontierPoint(strength=strength, reward=mean(drawn.batch.total), kl=kl)
            longest = max(longest, time.perf_counter() - began)
    finally:
        head.strength = trained_at
    return [points[strength] for strength in sorted(points)]


class _Samples:
    """Scored completions of all prompts; of ``best_of`` drawn together the best one is kept.

    Attributes:
        prompts: the prompt of each completion.
        completions, texts: what the model wrote.
        batch: its rewards.
        tokens_per_second: of generating, discarded completions included.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptSet,
        rewards: RewardSum,
        settings: MeasureSettings,
        greedy: bool = False,
    ) -> None:
        completions = sample(
            model,
            prompts.token_ids,
            num_generations=settings.num_generations * settings.best_of,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            ending_token_ids=settings.ending_token_ids,
            pad_token_id=settings.pad_token_id,
            seed=settings.seed,
            greedy=greedy,
        )
        tokens = sum(map(len, completions.token_ids))
        self.tokens_per_second = tokens / max(completions.seconds, 1e-9)
        self._keep(completions, tokenizer, prompts.prompts)
        self.batch = score_texts(rewards, self.prompts, self.texts)
        if settings.best_of > 1:
            total = self.batch.total
            starts = range(0, len(total), settings.best_of)
            best = [max(range(s, s + settings.best_of), key=total.__getitem__) for s in starts]
            self._keep(completions.take(best), tokenizer, prompts.prompts)
            # Scored again: a reward may compare the texts that it is given together.
            self.batch = score_texts(rewards, self.prompts, self.texts)

    def _keep(
        self, completions: Completions, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
    ) -> None:
        self.completions = completions
        self.texts = tokenizer.batch_decode(completions.token_ids, skip_special_tokens=True)
        self.prompts = [prompts[index] for index in completions.prompt_index]


def _by_prompt(values: Sequence[float], num_prompts: int) -> list[float]:
    each = len(values) // max(1, num_prompts)
    return [mean(values[start : start + each]) for start in range(0, len(values), max(1, each))]


def _term_means(batch: RewardBatch) -> dict[str, float]:
    return {
        name: mean([value for value in values if value is not None]) for name, values in batch.terms.items()
    }


def _kl(scores: Scores, completions: Completions, best_of: int) -> KlEstimate:
    if best_of > 1:
        # The best of n samples has no distribution to read; Beirami et al. (2024): at most log n - (n - 1) / n a completion.
        bound = math.log(best_of) - (best_of - 1) / best_of
        length = mean([float(len(ids)) for ids in completions.token_ids])
        return KlEstimate(value=bound / length, kind="bound")
    return KlEstimate(
        value=torch.cat(scores.kl).mean().item(),
        kind="exact",
        monte_carlo=torch.cat(scores.gains).mean().item(),
    )


def _disagreement(head: TeaHead | None, states: Tensor | None) -> float | None:
    """Root mean square of the members' spread over that of what they say together; None for one member or a fresh head."""
    if head is None or states is None or head.config.num_members == 1:
        return None
    ids = head.reference_logits(states).topk(min(128, head.shortlist_size), dim=-1).indices
    correction, _ = head.shortlist_correction(states, ids)
    size = correction.pow(2).mean().item()
    return math.sqrt(head.disagreement(states).mean().item() / size) if size > 0 else None


def _to_read(
    tokenizer: PreTrainedTokenizerBase, drawn: _Samples, scores: Scores | None, settings: MeasureSettings
) -> list[Sample]:
    """The first completion of each prompt; without scores, tokens are not coloured."""
    rows = range(0, len(drawn.texts), settings.num_generations)[: settings.num_samples]
    return [
        Sample(
            prompt=drawn.prompts[row].text,
            completion=drawn.texts[row],
            reward=drawn.batch.total[row],
            terms={name: values[row] for name, values in drawn.batch.terms.items()},
            tokens=token_texts(tokenizer, drawn.completions.token_ids[row]) if scores else [],
            gains=[round(gain, 4) for gain in scores.gains[row].tolist()] if scores else [],
        )
        for row in rows
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a token that ends within a character adds nothing, the one that completes it all of it."""
    texts, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=True)
        # A character that is not complete yet is decoded as the replacement character.
        whole = text if end == len(token_ids) else text.rstrip("\ufffd")
        texts.append(whole[len(before) :] if whole.startswith(before) else "")
        before = whole if whole.startswith(before) else before
    return texts
