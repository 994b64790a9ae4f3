"""The decode loop: batched sampling from a TEA head that records states and shortlists as it goes.

Each prompt is prefilled once and its cache expanded to the generations; a prefix common to all prompts (worked examples,
a system turn) is prefilled once for all of them. Every completion draws its own random numbers, so what it samples does
not depend on the batch around it. Finished completions leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tea_rl.backbone import Backbone
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import action_logps, entropy, sample_slots
from tea_rl.objectives.anchor import divergence
from tea_rl.rollout.cache import preallocate, select_rows
from tea_rl.rollout.trajectory import Rollout, TokenBatch

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
        stop: strings; a completion ends with the first token whose text contains one.
    """

    num_generations: int = 1
    max_new_tokens: int = 32
    temperature: float = 1.0
    greedy: bool = False
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
    uniforms = row_uniforms(row_keys, settings.max_new_tokens).to(backbone.device)
    ending = _ending_tokens(backbone, settings.stop)
    sequences = _Sequences(backbone, prompts, settings)
    finished = torch.zeros(len(row_keys), dtype=torch.bool, device=backbone.device)
    steps: list[TokenBatch] = []
    for position in range(settings.max_new_tokens):
        rows = sequences.live_rows()
        step = choose_tokens(head, sequences.live_states(), uniforms[rows, position], settings)
        step.rows, step.positions = rows, torch.full_like(rows, position)
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


def choose_tokens(head: TeaHead, states: Tensor, uniforms: Tensor, settings: DecodeSettings) -> TokenBatch:
    """Next tokens of ``N`` sequences and their records (``rows`` and ``positions`` still unset).

    Shape:
        states ``(N, D)``; uniforms ``(N, 2)``: the first chooses the slot, the second a token of the tail.
    """
    if head.full_vocabulary:
        base = head.reference_logits(states, settings.temperature)
        logits, shortlist, tail_probs = head.full_logits(states, base, settings.temperature), None, None
    else:
        shortlist, tail_probs = head.shortlist_of(states, settings.temperature)
        base = shortlist.slot_logits()
        logits = head.slot_logits(states, shortlist, settings.temperature)
    logps, base_logps = logits.log_softmax(dim=-1), base.log_softmax(dim=-1)
    choice = logits
    if settings.greedy and tail_probs is not None:
        # As a single token, the tail's best one competes, not the tail's whole mass.
        choice = torch.cat([logits[:, :-1], logits[:, -1:] + tail_probs.amax(1, keepdim=True).log()], dim=1)
    slots = choice.argmax(dim=-1) if settings.greedy else sample_slots(logits, uniforms[:, 0])
    actions, within_tail = _slots_to_tokens(slots, shortlist, tail_probs, uniforms[:, 1], settings.greedy)
    return TokenBatch(
        states=states,
        shortlist=shortlist,
        actions=actions,
        slots=slots,
        within_tail_logps=within_tail,
        logps=action_logps(logps, slots, within_tail),
        base_logps=action_logps(base_logps, slots, within_tail),
        kl=divergence("reverse_kl", logits, base, logps, base_logps),
        entropy=entropy(logps, None if shortlist is None else shortlist.tail_entropy),
        rows=actions,
        positions=actions,
    )


def _slots_to_tokens(slots, shortlist, tail_probs, uniforms, greedy) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """Token ids of chosen slots, and their log-probability within the tail (0 on the shortlist)."""
    within_tail = torch.zeros(slots.shape, dtype=torch.float32, device=slots.device)
    if shortlist is None:
        return slots, within_tail
    size = shortlist.ids.shape[1]
    actions = shortlist.ids.gather(1, slots.clamp(max=size - 1).unsqueeze(1)).squeeze(1)
    in_tail = (slots == size).nonzero().squeeze(1)
    if len(in_tail):
        probs = tail_probs[in_tail]
        chosen = probs.argmax(dim=-1) if greedy else sample_slots(probs.log(), uniforms[in_tail])
        actions[in_tail] = chosen
        within_tail[in_tail] = probs.gather(1, chosen.unsqueeze(1)).squeeze(1).log()
    return actions, within_tail


def _ending_tokens(backbone: Backbone, stop: tuple[str, ...]) -> Tensor:
    """``(V,)`` bool: tokens that end a completion."""
    ending = torch.zeros(backbone.vocab_size, dtype=torch.bool)
    ending[list(backbone.eos_token_ids)] = True
    if stop:
        known = min(len(backbone.tokenizer), backbone.vocab_size)
        texts = backbone.tokenizer.batch_decode([[token] for token in range(known)])
        ending[:known] |= torch.tensor([any(string in text for string in stop) for text in texts])
    return ending.to(backbone.device)


class _Sequences:
    """The growing sequences: cache, masks and the newest hidden state of every row still in the batch."""

    def __init__(
        self, backbone: Backbone, prompts: Sequence[Sequence[int]], settings: DecodeSettings
    ) -> None:
        self.backbone = backbone
        repeats = settings.num_generations
        states, mask, self.cache = _prefill(backbone, prompts)
        room = torch.ones(len(prompts), settings.max_new_tokens, dtype=mask.dtype, device=mask.device)
        self.length = mask.shape[1]
        preallocate(self.cache, repeats, self.length + settings.max_new_tokens)
        self.states = states.repeat_interleave(repeats, 0)
        self.mask = torch.cat([mask, room], dim=1).repeat_interleave(repeats, 0)
        self.positions = mask.sum(dim=1, keepdim=True).repeat_interleave(repeats, 0)
        self.rows = torch.arange(len(self.states), device=mask.device)
        self.live = torch.ones_like(self.rows, dtype=torch.bool)

    def live_rows(self) -> Tensor:
        """Indices of the completions that still grow."""
        return self.rows[self.live]

    def live_states(self) -> Tensor:
        return self.states if bool(self.live.all()) else self.states[self.live]

    def advance(self, actions: Tensor, ended: Tensor) -> None:
        """Append the live rows' tokens, drop rows that ended, and run the backbone by one token."""
        tokens = torch.full_like(self.rows, self.backbone.pad_token_id)
        tokens[self.live] = actions
        self.live[self.live.nonzero().squeeze(1)[ended]] = False
        if (~self.live).sum() >= _COMPACT_SHARE * len(self.live):
            keep = self.live.nonzero().squeeze(1)
            select_rows(self.cache, keep)
            self.rows, self.mask, self.positions = self.rows[keep], self.mask[keep], self.positions[keep]
            self.live, tokens = self.live[keep], tokens[keep]
        self.length += 1
        self.states = self.backbone.forward(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions,
            past_key_values=self.cache,
        )[:, -1]
        self.positions = self.positions + 1


def _prefill(backbone: Backbone, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
    """Run the prompts once. Returns last states ``(P, D)``, mask ``(P, length)`` and the filled cache."""
    device, count = backbone.device, len(prompts)
    cache = DynamicCache(config=backbone.model.config)
    shared = _shared_prefix(prompts)
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=device)
        backbone.forward(
            input_ids=prefix,
            attention_mask=torch.ones_like(prefix),
            position_ids=torch.arange(shared, device=device).unsqueeze(0),
            past_key_values=cache,
        )
        for layer in cache.layers:
            layer.batch_repeat_interleave(count)
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
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
    )
    return states[:, -1], mask, cache


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
