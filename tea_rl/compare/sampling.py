"""Completions of any causal language model through ``generate``, and their log-probabilities under policy and base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tea_rl.head.policy import sample_slots
from tea_rl.objectives.anchor import divergence

#: ``with base() as model:`` gives the base model to call; what it switched off is on again afterwards.
BaseModel: TypeAlias = Callable[[], AbstractContextManager[Any]]

#: Completions decoded together.
_DECODE_ROWS = 64
#: Positions whose logits over the vocabulary are alive at once, for policy and base model each.
_SCORE_POSITIONS = 512


@dataclass
class Completions:
    """Sampled token ids, the ending token included, and how long ``generate`` took.

    Attributes:
        token_ids: one list a completion, completions of a prompt side by side.
        prompt_index: the prompt of each.
        seconds: of generating all of them.
    """

    token_ids: list[list[int]]
    prompt_index: list[int]
    seconds: float

    def take(self, rows: Sequence[int]) -> Completions:
        """The completions at ``rows``."""
        return Completions(
            [self.token_ids[row] for row in rows], [self.prompt_index[row] for row in rows], self.seconds
        )


@dataclass
class Scores:
    """What the distributions say of the tokens of each completion, one tensor ``(length,)`` a completion, nats.

    Attributes:
        gains: log-probability minus that under the base model, at the sampling temperature.
        kl: exact KL(policy || base) in the state before the token, at the sampling temperature.
        surprises: minus log-probability under the base model, at temperature 1.
        states: what the watched head read before up to `max_states` of the tokens, ``(N, W)``; None without a head.
    """

    gains: list[Tensor]
    kl: list[Tensor]
    surprises: list[Tensor]
    states: Tensor | None = None


class _Draw:
    """A processor of logits that leaves one token a row, drawn by inverting its distribution, with a uniform number each.

    ``generate`` draws with ``multinomial``, which needs a random number for every token of the vocabulary: on a CPU a quarter
    of the time of a small model.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = sample_slots(scores / self._temperature, torch.rand(len(scores), device=scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    ending_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    greedy: bool = False,
) -> Completions:
    """Complete prompts, with no truncation of the distribution, and leave torch's global generators as they were.

    Args:
        model: anything with ``generate``; in evaluation mode afterwards.
        prompts: token ids of each.
        ending_token_ids: a completion ends with the first of these that it contains.
        greedy: take the likeliest token; ``num_generations`` should be 1 then.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    model.eval()
    # Everything that shapes the distribution is named, for a model's own generation settings fill what is left out.
    config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ending_token_ids),
        pad_token_id=pad_token_id,
    )
    index = [row for row in range(len(prompts)) for _ in range(num_generations)]
    device = next(model.parameters()).device
    found: list[list[int]] = [[] for _ in index]
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for rows in _decode_batches(model, [len(prompts[row]) for row in index]):
            torch.manual_seed(seed * 1_000_003 + rows[0])
            ids, mask = _padded([prompts[index[row]] for row in rows], pad_token_id, left=True)
            width = ids.shape[1]
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([] if greedy else [_Draw(temperature)]),
            )
            # A model behind a soft prompt may return the new tokens alone.
            new = out[:, width:] if out.shape[1] > width and _begins_with(out, ids) else out
            for row, tokens in zip(rows, new.tolist(), strict=True):
                found[row] = _until(tokens, ending_token_ids)
    return Completions(found, index, time.perf_counter() - started)


def _decode_batches(model: Any, lengths: list[int]) -> Iterator[list[int]]:
    """Rows that are decoded together. PEFT's soft prompts count padding as positions, so their rows must be of one length."""
    soft_prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    rows = sorted(range(len(lengths)), key=lengths.__getitem__) if soft_prompt else list(range(len(lengths)))
    groups = [list(group) for _, group in groupby(rows, key=lengths.__getitem__)] if soft_prompt else [rows]
    for group in groups:
        for start in range(0, len(group), _DECODE_ROWS):
            yield group[start : start + _DECODE_ROWS]


def _begins_with(out: Tensor, ids: Tensor) -> bool:
    return bool((out[:, : ids.shape[1]].cpu() == ids).all())


def _until(tokens: list[int], ending: Sequence[int]) -> list[int]:
    """Up to the first ending token, itself included; what follows is padding."""
    ends = set(ending)
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@torch.no_grad()
def score_completions(
    model: Any,
    base: BaseModel | None,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    temperature: float,
    head: Any | None = None,
    max_states: int = 512,
) -> Scores:
    """Run completions through policy and base model.

    Both models' full distributions are read in every state that was sampled from, so the KL is exact there whatever the
    policy is made of.

    Args:
        base: the base model; None where ``model`` is it. Not asked where a head is given.
        prompts: token ids of each prompt.
        head: a TEA head installed in ``model``: one pass through the frozen backbone serves policy and base, and its input
            states are kept.
        max_states: how many of them to keep, spread evenly.
    """
    scores = Scores([], [], [])
    states: list[Tensor] = []
    for rows in _batches([len(prompts[p]) for p in completions.prompt_index], completions):
        pairs = [(prompts[completions.prompt_index[row]], completions.token_ids[row]) for row in rows]
        with _watched(head) as seen:
            policy = answer_logits(model, pairs)
        if head is not None:
            answered = [
                own[len(before) - 1 :][: len(answer)]
                for own, (before, answer) in zip(seen[0], pairs, strict=True)
            ]
            base_logits = [head.reference_logits(own) for own in answered]
            states += answered
        elif base is None:
            base_logits = policy
        else:
            with base() as reference:
                base_logits = answer_logits(reference, pairs)
        for own, other, (_, answer) in zip(policy, base_logits, pairs, strict=True):
            actions = torch.tensor(answer, device=own.device).unsqueeze(1)
            logits, base_row = own.float() / temperature, other.float() / temperature
            logps, base_logps = logits.log_softmax(-1), base_row.log_softmax(-1)
            scores.kl.append(divergence("reverse_kl", logits, base_row, logps, base_logps).cpu())
            scores.gains.append((logps - base_logps).gather(1, actions).squeeze(1).cpu())
            plain = base_logps if temperature == 1.0 else other.float().log_softmax(-1)
            scores.surprises.append(-plain.gather(1, actions).squeeze(1).cpu())
    if states:
        every = torch.cat(states)
        scores.states = every[:: max(1, len(every) // max_states)]
    return scores


def _batches(prompt_lengths: list[int], completions: Completions) -> Iterator[list[int]]:
    """Rows in order, as many together as `_SCORE_POSITIONS` allows (at least one)."""
    batch: list[int] = []
    longest = 0
    for row, (before, answer) in enumerate(zip(prompt_lengths, completions.token_ids, strict=True)):
        length = before + len(answer)
        if batch and max(longest, length) * (len(batch) + 1) > _SCORE_POSITIONS:
            yield batch
            batch, longest = [], 0
        batch.append(row)
        longest = max(longest, length)
    if batch:
        yield batch


def answer_logits(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Logits from which each token of the answers was chosen: a list of ``(len(answer), V)``.

    Rows are padded on the right, so positions count from the first token whatever the architecture. Models behind a soft
    prompt return logits for it, too: it comes first, and is cut off.

    Args:
        pairs: token ids of what comes before (at least one token), and of the answer.
    """
    device = next(model.parameters()).device
    ids, mask = _padded([[*before, *answer] for before, answer in pairs], 0, left=False)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    logits = logits[:, logits.shape[1] - ids.shape[1] :]
    return [
        row[len(before) - 1 : len(before) - 1 + len(answer)]
        for row, (before, answer) in zip(logits, pairs, strict=True)
    ]


def _padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``(B, longest)`` each."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = 1
    return ids, mask


@contextmanager
def _watched(head: Any | None) -> Iterator[list[Tensor]]:
    """Collects what an installed head reads."""
    seen: list[Tensor] = []
    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
