"""The decode loop: batched sampling from a TEA head that records states and shortlists as it goes.

Each prompt is prefilled once; a prefix common to all prompts (worked examples, a system turn) is prefilled once for all
of them. The generations of a prompt share one cache row for as long as they have sampled the same tokens: the cache is
expanded where they part. Every completion draws its own random numbers, so what it samples does not depend on the batch
around it. Finished completions leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.context import ContextState
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import Shortlist, action_logps, entropy, sample_slots
from tea_rl.objectives.anchor import divergence
from tea_rl.rollout.cache import preallocate, select_rows
from tea_rl.rollout.trajectory import Rollout, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A batch is compacted when at least this share of its rows has finished; compacting copies the cache.
_COMPACT_SHARE = 0.125
#: A shared prefix shorter than this is not worth a forward pass of its own.
_MIN_SHARED_PREFIX = 16


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


@torch.no_grad()
def generate(
    backbone: Backbone,
    head: TeaHead,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    seed: Sequence[int] = (0,),
    prompt_keys: Sequence[int] | None = None,
) -> Rollout:
    """Generate completions and record every token of them.

    Args:
        backbone: the frozen model.
        head: the policy, at its current ``strength``; it need not be installed.
        prompts: token ids of each prompt, none empty.
        settings: lengths, temperature, stopping.
        seed: key of this rollout; with a prompt's key and the generation's index it seeds that completion.
        prompt_keys: keys of the prompts (by default their position), so that a prompt samples the same in any batch.

    Returns:
        completions of a prompt side by side, ``len(prompts) * num_generations`` in all.
    """
    training = head.training
    head.eval()
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    row_keys = [(*seed, key, generation) for key in keys for generation in range(settings.num_generations)]
    uniforms = row_uniforms(row_keys, settings.max_new_tokens)
    if backbone.device.type == "mps":
        uniforms = uniforms.float()
    uniforms = uniforms.to(backbone.device)
    greedy = torch.full((len(row_keys),), settings.greedy, device=backbone.device)
    if settings.greedy_last:
        greedy[settings.num_generations - 1 :: settings.num_generations] = True
    ending = _ending_tokens(backbone, settings.stop)
    sequences = _Sequences(backbone, prompts, settings, ContextState.begin(head.config.context))
    finished = torch.zeros(len(row_keys), dtype=torch.bool, device=backbone.device)
    steps: list[TokenBatch] = []
    num_states = 0
    for position in range(settings.max_new_tokens):
        rows = sequences.rows
        step = choose_tokens(
            head,
            sequences.states,
            sequences.at,
            uniforms[rows, position],
            greedy[rows],
            settings.temperature,
        )
        step.rows, step.positions = rows, torch.full_like(rows, position)
        step.state_ids = sequences.at + num_states
        num_states += len(sequences.states)
        steps.append(step)
        ended = ending[step.actions]
        finished[rows[ended]] = True
        if ended.all() or position == settings.max_new_tokens - 1:
            break
        sequences.advance(step.actions, ended)
    head.train(training)

    tokens = TokenBatch.cat(steps)
    tokens = tokens.select(torch.argsort(tokens.rows, stable=True))
    lengths = torch.bincount(tokens.rows, minlength=len(row_keys))
    texts = backbone.tokenizer.batch_decode(
        [ids.tolist() for ids in tokens.actions.split(lengths.tolist())], skip_special_tokens=True
    )
    prompt_index = torch.arange(len(prompts)).repeat_interleave(settings.num_generations)
    return Rollout(tokens, texts, lengths, finished, prompt_index)


def choose_tokens(
    head: TeaHead, states: Tensor, at: Tensor, uniforms: Tensor, greedy: Tensor, temperature: float
) -> TokenBatch:
    """Next tokens of ``N`` completions and their records (``rows``, ``positions`` and the offset of ``state_ids`` still unset).

    Args:
        head: the policy.
        states: newest states of the ``U`` distinct sequences, ``(U, D)``, wide where the head reads context features.
        at: which of them each completion has, ``(N,)``.
        uniforms: ``(N, 2)``; the first chooses the slot, the second a token of the tail.
        greedy: which of them take the likeliest token instead, ``(N,)`` bool.
        temperature: divides the logits.
    """
    # Everything that depends on the state alone is computed once for all completions that share it.
    if head.full_vocabulary:
        base = head.reference_logits(states, temperature)
        logits, shortlist, tail_probs = head.full_logits(states, base, temperature), None, None
        within_entropy = None
    else:
        shortlist, tail_probs = head.shortlist_of(states, temperature)
        base = shortlist.slot_logits()
        logits = head.slot_logits(states, shortlist, temperature)
        within_entropy = shortlist.tail_entropy
    if not bool(torch.isfinite(logits).all()):
        raise TeaError(
            "the head gives logits that are not finite: it has diverged; start a new run with a lower train.learning_rate"
        )
    logps, base_logps = logits.log_softmax(dim=-1), base.log_softmax(dim=-1)
    kl = divergence("reverse_kl", logits, base, logps, base_logps)

    slots = sample_slots(logits[at], uniforms[:, 0])
    if bool(greedy.any()):
        greedy_at = at[greedy]
        slots[greedy] = _greedy_slots(
            logits[greedy_at], None if tail_probs is None else tail_probs[greedy_at]
        )
    own_shortlist = None if shortlist is None else Shortlist(*(part[at] for part in shortlist))
    actions, within_tail = _slots_to_tokens(slots, own_shortlist, tail_probs, at, uniforms[:, 1], greedy)
    return TokenBatch(
        states=states[at],
        shortlist=own_shortlist,
        actions=actions,
        slots=slots,
        within_tail_logps=within_tail,
        logps=action_logps(logps[at], slots, within_tail),
        base_logps=action_logps(base_logps[at], slots, within_tail),
        kl=kl[at],
        entropy=entropy(logps, within_entropy)[at],
        state_ids=at,
        rows=actions,
        positions=actions,
    )


def _greedy_slots(logits: Tensor, tail_probs: Tensor | None) -> Tensor:
    """Slot of the likeliest token. The tail competes with its best token, not with its whole mass."""
    if tail_probs is None:
        return logits.argmax(dim=-1)
    best_of_tail = logits[:, -1:] + tail_probs.amax(1, keepdim=True).log()
    return torch.cat([logits[:, :-1], best_of_tail], dim=1).argmax(dim=-1)


def _slots_to_tokens(
    slots: Tensor,
    shortlist: Shortlist | None,
    tail_probs: Tensor | None,
    at: Tensor,
    uniforms: Tensor,
    greedy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Token ids of chosen slots, and their log-probability within the tail (0 on the shortlist)."""
    within_tail = torch.zeros(slots.shape, dtype=torch.float32, device=slots.device)
    if shortlist is None or tail_probs is None:
        return slots, within_tail
    size = shortlist.ids.shape[1]
    actions = shortlist.ids.gather(1, slots.clamp(max=size - 1).unsqueeze(1)).squeeze(1)
    in_tail = (slots == size).nonzero().squeeze(1)
    if len(in_tail):
        probs = tail_probs[at[in_tail]]
        sampled = sample_slots(probs.log(), uniforms[in_tail])
        chosen = torch.where(greedy[in_tail], probs.argmax(dim=-1), sampled)
        actions[in_tail] = chosen
        within_tail[in_tail] = probs.gather(1, chosen.unsqueeze(1)).squeeze(1).log()
    return actions, within_tail


def _ending_tokens(backbone: Backbone, stop: tuple[str, ...]) -> Tensor:
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


class _Sequences:
    """The growing sequences: cache, running means, masks and newest states of the distinct ones, and who has which.

    Attributes:
        rows: completions that still grow, ``(N,)``.
        at: the distinct sequence each of them has so far, ``(N,)``.
        states: newest state of each distinct sequence, ``(U, D)``, wide with a context.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        settings: DecodeSettings,
        context: ContextState | None = None,
    ) -> None:
        self.backbone, self.context = backbone, context
        self.states, mask, self.cache = _prefill(backbone, prompts, context)
        room = torch.ones(len(prompts), settings.max_new_tokens, dtype=mask.dtype, device=mask.device)
        self.length = mask.shape[1]
        preallocate(self.cache, self.length + settings.max_new_tokens)
        self.mask = torch.cat([mask, room], dim=1)
        self.positions = mask.sum(dim=1, keepdim=True)
        self.at = torch.arange(len(prompts), device=mask.device).repeat_interleave(settings.num_generations)
        self.rows = torch.arange(len(self.at), device=mask.device)

    def advance(self, actions: Tensor, ended: Tensor) -> None:
        """Append the completions' tokens, let go of those that ended, and run the backbone by one token."""
        self.rows, actions = self.rows[~ended], actions[~ended]
        pairs = self.at[~ended] * self.backbone.vocab_size + actions
        distinct, which = torch.unique(pairs, return_inverse=True)
        parents, tokens = distinct // self.backbone.vocab_size, distinct % self.backbone.vocab_size
        if self._must_rearrange(parents):
            select_rows(self.cache, parents)
            if self.context is not None:
                self.context.select_rows(parents)
            self.mask, self.positions, self.at = self.mask[parents], self.positions[parents], which
        else:
            self.at = parents[which]
            tokens = torch.full_like(self.positions[:, 0], self.backbone.pad_token_id).scatter_(
                0, parents, tokens
            )
        self.length += 1
        self.states = self.backbone.forward(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions,
            past_key_values=self.cache,
            context=self.context,
        )[:, -1]
        self.positions = self.positions + 1

    def _must_rearrange(self, parents: Tensor) -> bool:
        """Whether sequences part, or enough of them have ended to be worth a copy of the cache."""
        held = len(self.positions)
        parted = len(parents.unique()) < len(parents)
        return parted or held - len(parents) >= max(1, _COMPACT_SHARE * held)


def _prefill(
    backbone: Backbone, prompts: Sequence[Sequence[int]], context: ContextState | None
) -> tuple[Tensor, Tensor, DynamicCache]:
    """Run the prompts once. Returns last states ``(P, D)``, mask ``(P, length)`` and the filled cache."""
    device, count = backbone.device, len(prompts)
    cache = DynamicCache(config=backbone.model.config)
    shared = _shared_prefix(prompts)
    # Padding will stand between the prefix and the rest: harmless where positions are given and attention is full.
    plain = backbone.takes_positions and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain:
        shared = 0
    if shared:
        cache, read = _prefix(backbone, tuple(prompts[0][:shared]), context)
        for layer in cache.layers:
            layer.batch_repeat_interleave(count)
        if context is not None and read is not None:
            read.repeat_interleave(count)
            vars(context).update(vars(read))
    rest = [prompt[shared:] for prompt in prompts]
    longest = max(map(len, rest))
    ids = torch.full((count, longest), backbone.pad_token_id)
    mask = torch.zeros(count, shared + longest, dtype=torch.long)
    mask[:, :shared] = 1
    for row, tokens in enumerate(rest):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, shared + longest - len(tokens) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]
    states = backbone.forward(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, context=context
    )
    return states[:, -1], mask, cache


def _prefix(
    backbone: Backbone, tokens: tuple[int, ...], context: ContextState | None
) -> tuple[DynamicCache, ContextState | None]:
    """Cache and running means of one row after a shared prefix. The newest is remembered: worked examples seldom change."""
    key = (tokens, None if context is None else context.config)
    if backbone.newest_prefix is None or backbone.newest_prefix[0] != key:
        cache, read = DynamicCache(config=backbone.model.config), copy(context)
        ids = torch.tensor([tokens], device=backbone.device)
        backbone.forward(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(len(tokens), device=backbone.device).unsqueeze(0),
            past_key_values=cache,
            context=read,
        )
        backbone.newest_prefix = (key, cache, read)
    _, cache, read = backbone.newest_prefix
    return deepcopy(cache), deepcopy(read)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the token prefix common to all prompts, leaving each at least one token; 0 where not worth it."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(list, prompts))
    first, last = ordered[0], ordered[-1]
    shortest = min(map(len, prompts)) - 1
    shared = 0
    while shared < shortest and first[shared] == last[shared]:
        shared += 1
    return shared if shared >= _MIN_SHARED_PREFIX else 0
