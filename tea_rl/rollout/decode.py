"""The decode loop: batched sampling from a TEA head that records states and shortlists as it goes.

Each prompt is prefilled once; a prefix common to all prompts (worked examples, a system turn) is prefilled once for all
of them. The generations of a prompt share one cache row for as long as they have sampled the same tokens: the cache is
expanded where they part. Every completion draws its own random numbers, so what it samples does not depend on the batch
around it. Finished completions leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.context import ContextState
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import Shortlist, action_logps, build_shortlist, entropy, sample_columns, sample_slots
from tea_rl.head.scratch import Scratch
from tea_rl.objectives.anchor import divergence
from tea_rl.rollout.sequences import Sequences, prefill
from tea_rl.rollout.trajectory import Rollout, TokenBatch
from tea_rl.stage_clock import OFF, StageClock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: States whose distributions over the vocabulary are alive at once while given tokens are scored.
_SCORE_BLOCK = 256


@dataclass(frozen=True)
class DecodeSettings:
    """How to decode.

    Attributes:
        num_generations: completions of each prompt.
        max_new_tokens: longest completion.
        temperature: divides the logits; the policy is defined at it. Ignored by the choice of a greedy token.
        greedy: take the likeliest token.
        greedy_last: of every prompt's completions the last one takes the likeliest tokens, the others are sampled.
        stop: strings; a completion ends with the first token whose text contains one.
    """

    num_generations: int = 1
    max_new_tokens: int = 32
    temperature: float = 1.0
    greedy: bool = False
    greedy_last: bool = False
    stop: tuple[str, ...] = ()


def row_uniforms(keys: Sequence[Sequence[int]], length: int) -> Tensor:
    """Two uniforms for every token of every row, from the row's own key: ``(len(keys), length, 2)``, float64."""
    draws = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random((length, 2))
        for key in keys
    ]
    return torch.from_numpy(np.stack(draws))


def uniforms_on(device: torch.device, keys: Sequence[Sequence[int]], length: int) -> Tensor:
    """`row_uniforms` where they are needed, in the finest precision there."""
    uniforms = row_uniforms(keys, length)
    return (uniforms.float() if device.type == "mps" else uniforms).to(device)


def generate(
    backbone: Backbone,
    head: TeaHead,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    seed: Sequence[int] = (0,),
    prompt_keys: Sequence[int] | None = None,
    clock: StageClock = OFF,
) -> Rollout:
    """Generate completions and record every token of them.

    Args:
        backbone: the frozen model.
        head: the policy, at its current ``strength``; it need not be installed.
        prompts: token ids of each prompt, none empty.
        settings: lengths, temperature, stopping.
        seed: key of this rollout; with a prompt's key and the generation's index it seeds that completion.
        prompt_keys: keys of the prompts (by default their position), so that a prompt samples the same in any batch.
        clock: hears of the stages prefill, decode, head and sampling.

    Returns:
        completions of a prompt side by side, ``len(prompts) * num_generations`` in all.
    """
    training = head.training
    head.eval()
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    row_keys = [(*seed, key, generation) for key in keys for generation in range(settings.num_generations)]
    uniforms = uniforms_on(backbone.device, row_keys, settings.max_new_tokens)
    greedy = torch.full((len(row_keys),), settings.greedy, device=backbone.device)
    if settings.greedy_last:
        greedy[settings.num_generations - 1 :: settings.num_generations] = True
    ending = ending_tokens(backbone, settings.stop)
    at = torch.arange(len(prompts), device=backbone.device).repeat_interleave(settings.num_generations)
    finished = torch.zeros(len(row_keys), dtype=torch.bool, device=backbone.device)
    with torch.inference_mode():
        with clock.stage("prefill"):
            start = prefill(backbone, prompts, ContextState.begin(head.config.context))
            sequences = Sequences(backbone, start, at, settings.max_new_tokens, share=True)
        steps = _decode(head, sequences, settings, uniforms, greedy, ending, finished, clock)
    head.train(training)

    tokens = TokenBatch.cat(steps)  # copies: what was made in inference mode cannot be trained on
    tokens = tokens.select(torch.argsort(tokens.rows, stable=True))
    lengths = torch.bincount(tokens.rows, minlength=len(row_keys))
    texts = backbone.tokenizer.batch_decode(
        [ids.tolist() for ids in tokens.actions.split(lengths.tolist())], skip_special_tokens=True
    )
    prompt_index = torch.arange(len(prompts)).repeat_interleave(settings.num_generations)
    return Rollout(tokens, texts, lengths, finished, prompt_index)


def _decode(
    head: TeaHead,
    sequences: Sequences,
    settings: DecodeSettings,
    uniforms: Tensor,
    greedy: Tensor,
    ending: Tensor,
    finished: Tensor,
    clock: StageClock,
) -> list[TokenBatch]:
    """All steps of `generate`; ``finished`` becomes True where a completion ends by itself."""
    steps: list[TokenBatch] = []
    num_states, scratch = 0, Scratch()
    for position in range(settings.max_new_tokens):
        rows, at = sequences.rows, sequences.at
        draws = uniforms[rows, position]
        step = choose_tokens(
            head, sequences.states, at, draws, greedy[rows], settings.temperature, clock, scratch
        )
        step.rows, step.positions = rows, torch.full_like(rows, position)
        step.state_ids = at + num_states
        num_states += len(sequences.states)
        steps.append(step)
        ended = ending[step.actions]
        finished[rows[ended]] = True
        if ended.all() or position == settings.max_new_tokens - 1:
            break
        with clock.stage("decode"):
            sequences.advance(step.actions, ended)
    return steps


def choose_tokens(
    head: TeaHead,
    states: Tensor,
    at: Tensor,
    uniforms: Tensor,
    greedy: Tensor,
    temperature: float,
    clock: StageClock = OFF,
    scratch: Scratch | None = None,
) -> TokenBatch:
    """Next tokens of ``N`` completions and their records (``rows``, ``positions`` and the offset of ``state_ids`` still unset).

    Args:
        head: the policy.
        states: newest states of the ``U`` distinct sequences, ``(U, D)``, wide where the head reads context features.
        at: which of them each completion has, ``(N,)``.
        uniforms: ``(N, 2)``; the first chooses the slot, the second a token of the tail.
        greedy: which of them take the likeliest token instead, ``(N,)`` bool.
        temperature: divides the logits.
        clock: hears of the stages head and sampling.
        scratch: of the rollout, for what is as wide as the vocabulary and is not kept.
    """
    scratch = scratch or Scratch()
    with clock.stage("head"):
        reference = head.reference_logits(states, temperature, scratch)
        policy, tail_probs = _policy_at(head, states, reference, temperature, scratch)
    with clock.stage("sampling"):
        return _choose(policy, tail_probs, states, at, uniforms, greedy)


def _choose(
    policy: _Policy, tail_probs: Tensor | None, states: Tensor, at: Tensor, uniforms: Tensor, greedy: Tensor
) -> TokenBatch:
    """`choose_tokens` once the policy is known."""
    slots = sample_slots(policy.logits[at], uniforms[:, 0])
    if bool(greedy.any()):
        greedy_at = at[greedy]
        slots[greedy] = _greedy_slots(
            policy.logits[greedy_at],
            None if policy.shortlist is None else policy.shortlist.ids[greedy_at],
            None if tail_probs is None else tail_probs[greedy_at],
        )
    listed = None if policy.shortlist is None else policy.shortlist.ids[at]
    actions, within_tail = _slots_to_tokens(slots, listed, tail_probs, at, uniforms[:, 1], greedy)
    return _record(policy, states, at, actions, slots, within_tail)


def score_tokens(
    head: TeaHead, states: Tensor, at: Tensor, actions: Tensor, temperature: float
) -> TokenBatch:
    """Records of given tokens, as if they had been sampled (``rows``, ``positions`` and the offset of ``state_ids`` still unset).

    Args:
        head: the policy.
        states: ``U`` states, ``(U, D)``, wide where the head reads context features.
        at: the state that each of the ``N`` tokens follows, ``(N,)``.
        actions: the tokens, ``(N,)``.
        temperature: divides the logits.
    """
    parts, places, scratch = [], [], Scratch()
    for start in range(0, max(len(states), 1), _SCORE_BLOCK):
        block = states[start : start + _SCORE_BLOCK]
        place = ((at >= start) & (at < start + _SCORE_BLOCK)).nonzero().squeeze(1)
        own_at, own_actions = at[place] - start, actions[place]
        reference = head.reference_logits(block, temperature, scratch)
        reference_chosen = reference[own_at, own_actions]  # before the shortlist overwrites them
        policy, _ = _policy_at(head, block, reference, temperature, scratch)
        slots, within_tail = own_actions, torch.zeros_like(reference_chosen)
        if policy.shortlist is not None:
            matches = policy.shortlist.ids[own_at] == own_actions.unsqueeze(1)
            in_tail = ~matches.any(dim=1)
            slots = torch.where(in_tail, matches.shape[1], matches.int().argmax(dim=1))
            within_tail = torch.where(
                in_tail, reference_chosen - policy.shortlist.tail_logsumexp[own_at], within_tail
            )
        record = _record(policy, block, own_at, own_actions, slots, within_tail)
        record.state_ids = at[place]
        parts.append(record)
        places.append(place)
    return TokenBatch.cat(parts).select(torch.argsort(torch.cat(places)))


class _Policy(NamedTuple):
    """What depends on ``U`` states alone, computed once for all completions that share them."""

    shortlist: Shortlist | None
    logits: Tensor
    logps: Tensor
    base_logps: Tensor
    kl: Tensor
    entropy: Tensor


def _policy_at(
    head: TeaHead, states: Tensor, reference: Tensor, temperature: float, scratch: Scratch
) -> tuple[_Policy, Tensor | None]:
    """The policy in states whose reference logits are given (and may be overwritten), and the tail's distribution."""
    if head.full_vocabulary:
        base, logits = reference, head.full_logits(states, reference, temperature)
        shortlist, tail_probs, within_entropy = None, None, None
    else:
        shortlist, tail_probs = build_shortlist(reference, head.shortlist_size, scratch)
        base = shortlist.slot_logits()
        logits = head.slot_logits(states, shortlist, temperature)
        within_entropy = shortlist.tail_entropy
    if not bool(torch.isfinite(logits).all()):
        raise TeaError(
            "the head gives logits that are not finite: it has diverged; start a new run with a lower train.learning_rate"
        )
    logps, base_logps = logits.log_softmax(dim=-1), base.log_softmax(dim=-1)
    kl = divergence("reverse_kl", logits, base, logps, base_logps)
    return _Policy(shortlist, logits, logps, base_logps, kl, entropy(logps, within_entropy)), tail_probs


def _record(
    policy: _Policy, states: Tensor, at: Tensor, actions: Tensor, slots: Tensor, within_tail: Tensor
) -> TokenBatch:
    return TokenBatch(
        states=states[at],
        shortlist=None if policy.shortlist is None else Shortlist(*(part[at] for part in policy.shortlist)),
        actions=actions,
        slots=slots,
        within_tail_logps=within_tail,
        logps=action_logps(policy.logps[at], slots, within_tail),
        base_logps=action_logps(policy.base_logps[at], slots, within_tail),
        kl=policy.kl[at],
        entropy=policy.entropy[at],
        state_ids=at,
        rows=actions,
        positions=actions,
    )


def _greedy_slots(logits: Tensor, listed: Tensor | None, tail_probs: Tensor | None) -> Tensor:
    """Slot of the likeliest token. The tail competes with its best token, not with its whole mass.

    Of equally likely tokens it is the first of the vocabulary, as in ``argmax``: logits in half precision are often equal.
    """
    if listed is None or tail_probs is None:
        return logits.argmax(dim=-1)
    best = logits[:, :-1].amax(dim=1, keepdim=True)
    slots = listed.masked_fill(logits[:, :-1] < best, torch.iinfo(listed.dtype).max).argmin(dim=1)
    best_of_tail = logits[:, -1:] + tail_probs.amax(1, keepdim=True).log()
    return torch.where((best_of_tail > best).squeeze(1), listed.shape[1], slots)


def _slots_to_tokens(
    slots: Tensor,
    listed: Tensor | None,
    tail_probs: Tensor | None,
    at: Tensor,
    uniforms: Tensor,
    greedy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Token ids of chosen slots, and their log-probability within the tail (0 on the shortlist)."""
    within_tail = torch.zeros(slots.shape, dtype=torch.float32, device=slots.device)
    if listed is None or tail_probs is None:
        return slots, within_tail
    size = listed.shape[1]
    actions = listed.gather(1, slots.clamp(max=size - 1).unsqueeze(1)).squeeze(1)
    in_tail = (slots == size).nonzero().squeeze(1)
    if len(in_tail):
        probs, likeliest = tail_probs[at[in_tail]], greedy[in_tail]
        chosen = sample_columns(probs, uniforms[in_tail])
        if bool(likeliest.any()):
            chosen = torch.where(likeliest, probs.argmax(dim=-1), chosen)
        actions[in_tail] = chosen
        within_tail[in_tail] = probs.gather(1, chosen.unsqueeze(1)).squeeze(1).log()
    return actions, within_tail


def ending_tokens(backbone: Backbone, stop: tuple[str, ...]) -> Tensor:
    """``(V,)`` bool: tokens that end a completion."""
    ending = torch.zeros(backbone.vocab_size, dtype=torch.bool)
    ending[[token for token in backbone.eos_token_ids if token < backbone.vocab_size]] = True
    if stop:
        ending[list(_tokens_containing(backbone.tokenizer, stop, backbone.vocab_size))] = True
    return ending.to(backbone.device)


@lru_cache(maxsize=8)
def _tokens_containing(
    tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], vocab_size: int
) -> tuple[int, ...]:
    """Ids of the tokens whose text contains one of the strings; found once, for it decodes the whole vocabulary."""
    texts = tokenizer.batch_decode([[token] for token in range(min(len(tokenizer), vocab_size))])
    return tuple(token for token, text in enumerate(texts) if any(string in text for string in stop))
