"""Turns where the environment lists what may be said: the policy scores every choice instead of writing freely.

A choice's score is the log-probability of its tokens (the end of the turn included) after the conversation; the policy
over choices is the softmax of the scores, exact and summing to 1. Only the choices' own tokens run: they share the
conversation's cache row, and a choice whose tokens begin another choice runs with that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tea_rl.backbone import Backbone
from tea_rl.head.layer import TeaHead
from tea_rl.rollout.cache import CachedRow
from tea_rl.rollout.decode import score_tokens
from tea_rl.rollout.sequences import extend
from tea_rl.rollout.trajectory import TokenBatch


@dataclass
class ChoiceBatch:
    """``Q`` decisions between ``C`` listed choices in all, with what a learner needs to compute the policy again.

    `choice_logps` of ``tokens.logps`` (recorded, or recomputed with `TeaHead.terms`) gives the policy over choices.

    Attributes:
        tokens: every token of every choice, ordered by choice, then position; ``rows`` is the number of the choice. Choices
            that begin alike share states (``state_ids``).
        texts: the choices, ``C`` of them, those of a decision side by side.
        decision_of_choice: ``(C,)``.
        chosen: the choice that was taken, a number below ``C``, ``(Q,)``.
        turns: index of each decision's turn in `EpisodeBatch.turns`, ``(Q,)``.
        logps: log-probability of the chosen choice under the behaviour policy (nats), ``(Q,)``.
        base_logps: the same under the original model.
        kl: exact KL(behaviour || original model) over the choices, ``(Q,)``.
        entropy: of the behaviour policy over the choices, ``(Q,)``.
    """

    tokens: TokenBatch
    texts: list[str]
    decision_of_choice: Tensor
    chosen: Tensor
    turns: Tensor
    logps: Tensor
    base_logps: Tensor
    kl: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return self.chosen.shape[0]

    @staticmethod
    def cat(batches: Sequence[ChoiceBatch]) -> ChoiceBatch:
        """Join batches. ``turns`` keep the numbers that they have in each one's rollout."""
        decisions, chosen = [], []
        num_choices = num_decisions = 0
        for batch in batches:
            decisions.append(batch.decision_of_choice + num_decisions)
            chosen.append(batch.chosen + num_choices)
            num_choices += len(batch.texts)
            num_decisions += len(batch)
        joined = {
            name: torch.cat([getattr(batch, name) for batch in batches])
            for name in ("turns", "logps", "base_logps", "kl", "entropy")
        }
        texts = [text for batch in batches for text in batch.texts]
        return ChoiceBatch(
            TokenBatch.join([batch.tokens for batch in batches]),
            texts,
            torch.cat(decisions),
            torch.cat(chosen),
            **joined,
        )

    def select(self, index: Tensor) -> ChoiceBatch:
        """The decisions at ``index`` (``(M,)``, each at most once), in that order."""
        place = torch.full((len(self),), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        # Choices by the new order of their decisions; those of a decision stay side by side.
        order = torch.argsort(place[self.decision_of_choice], stable=True)
        kept = order[place[self.decision_of_choice[order]] >= 0]
        number = torch.full((len(self.decision_of_choice),), -1, device=index.device)
        number[kept] = torch.arange(len(kept), device=index.device)
        tokens = self.tokens.select((number[self.tokens.rows] >= 0).nonzero().squeeze(1))
        tokens.rows = number[tokens.rows]
        return ChoiceBatch(
            tokens,
            [self.texts[choice] for choice in kept.tolist()],
            place[self.decision_of_choice[kept]],
            number[self.chosen[index]],
            *(values[index] for values in (self.turns, self.logps, self.base_logps, self.kl, self.entropy)),
        )


def choice_logps(token_logps: Tensor, choice_of_token: Tensor, decision_of_choice: Tensor) -> Tensor:
    """Log-probability of every choice within its decision: the softmax of the choices' summed token log-probabilities.

    Differentiable. Every choice has a token, every decision a choice.

    Shape:
        token_logps ``(N,)``; choice_of_token ``(N,)``; decision_of_choice ``(C,)``; returns ``(C,)``.

    >>> choice_logps(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 0])).exp()
    tensor([0.5000, 0.5000])
    """
    scores = token_logps.new_zeros(len(decision_of_choice)).index_add(0, choice_of_token, token_logps)
    return scores - _logsumexp(scores, decision_of_choice)[decision_of_choice]


def choice_divergence(
    name: str, token_logps: Tensor, base_logps: Tensor, choice_of_token: Tensor, decision_of_choice: Tensor
) -> Tensor:
    """Distance between the policies over choices of a head and of the original model, by its name in the recipe.

    Those of `tea_rl.objectives.anchor.divergence`, with the choices for tokens; the logit of a choice is the sum of its tokens'
    log-probabilities. Differentiable in ``token_logps``.

    Shape:
        token_logps and base_logps ``(N,)``; the others as for `choice_logps`; returns one number a decision, ``(Q,)``.

    Raises:
        ValueError: for another name.
    """
    own, base = (
        choice_logps(logps, choice_of_token, decision_of_choice) for logps in (token_logps, base_logps)
    )
    sums = own.new_zeros(int(decision_of_choice.max()) + 1)
    if name == "reverse_kl":
        return sums.index_add(0, decision_of_choice, own.exp() * (own - base))
    if name == "forward_kl":
        return sums.index_add(0, decision_of_choice, base.exp() * (base - own))
    if name != "logit_l1":
        raise ValueError(f"unknown divergence {name!r}; expected reverse_kl, forward_kl or logit_l1")
    logits, base_logits = (
        own.new_zeros(len(decision_of_choice)).index_add(0, choice_of_token, logps)
        for logps in (token_logps, base_logps)
    )
    count = sums.index_add(0, decision_of_choice, torch.ones_like(own))
    mean = sums.index_add(0, decision_of_choice, base_logits) / count
    squares = (base_logits - mean[decision_of_choice]) ** 2
    # A choice without alternatives has no spread.
    spread = (sums.index_add(0, decision_of_choice, squares) / (count - 1).clamp(min=1)).sqrt()
    return sums.index_add(0, decision_of_choice, (logits - base_logits).abs()) / count / (spread + 1.0)


def _logsumexp(scores: Tensor, group: Tensor) -> Tensor:
    count = int(group.max()) + 1 if len(group) else 0
    best = scores.detach().new_full((count,), -torch.inf)
    best = best.scatter_reduce(0, group, scores.detach(), "amax")
    sums = scores.new_zeros(count).index_add(0, group, (scores - best[group]).exp())
    return sums.log() + best


def score_choices(
    backbone: Backbone,
    head: TeaHead,
    rows: Sequence[CachedRow],
    token_ids: Sequence[list[int]],
    states: Tensor,
    choices: Sequence[Sequence[Sequence[int]]],
    temperature: float,
    max_rows: int,
) -> tuple[list[TokenBatch], int]:
    """Score the choices of ``U`` conversations.

    Args:
        rows: what the cache holds of each: the whole conversation.
        token_ids: of each conversation.
        states: newest state of each, ``(U, W)``.
        choices: token ids of the choices of each, none empty.
        max_rows: cache rows that are alive at once, unless one conversation alone needs more.

    Returns:
        for each conversation the records of its choices' tokens (``rows`` counts its choices, ``state_ids`` its states); and
        the token positions that went through the backbone.
    """
    records: list[TokenBatch] = []
    tokens_run = 0
    for chunk in _chunks([_inputs(listed) for listed in choices], max_rows):
        lanes = [(row, lane) for row, lanes in chunk for lane in lanes]
        # The state after every beginning of a choice, the empty one first.
        known: dict[int, dict[tuple[int, ...], Tensor]] = {row: {(): states[row]} for row, _ in chunk}
        if lanes:
            ids = [[*token_ids[row], *lane] for row, lane in lanes]
            passed, after = extend(backbone, [rows[row] for row, _ in lanes], ids, head.config.context)
            tokens_run += after.tokens_run
            for number, (row, lane) in enumerate(lanes):
                for length in range(1, len(lane) + 1):
                    known[row].setdefault(lane[:length], passed[number, length - len(lane) - 1])
        records += [_records(head, known[row], choices[row], temperature) for row, _ in chunk]
    return records, tokens_run


def _records(
    head: TeaHead,
    known: dict[tuple[int, ...], Tensor],
    choices: Sequence[Sequence[int]],
    temperature: float,
) -> TokenBatch:
    place = {beginning: number for number, beginning in enumerate(known)}
    states = torch.stack(list(known.values()))
    triples = [
        (number, position, place[tuple(choice[:position])])
        for number, choice in enumerate(choices)
        for position in range(len(choice))
    ]
    numbers, positions, at = torch.tensor(triples, device=states.device).unbind(1)
    actions = torch.tensor([token for choice in choices for token in choice], device=states.device)
    record = score_tokens(head, states, at, actions, temperature)
    record.rows, record.positions = numbers, positions
    return record


def _inputs(choices: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What has to run of a conversation's choices: all but each last token, without those that begin another one."""
    ordered = sorted({tuple(choice[:-1]) for choice in choices})
    # Sorted, the longer one follows at once.
    followed = zip(ordered, [*ordered[1:], ()], strict=True)
    return [lane for lane, after in followed if lane and after[: len(lane)] != lane]


def _chunks(
    inputs: Sequence[list[tuple[int, ...]]], max_rows: int
) -> Iterator[list[tuple[int, list[tuple[int, ...]]]]]:
    """Whole conversations, in order, so many that their inputs fit into ``max_rows``."""
    chunk: list[tuple[int, list[tuple[int, ...]]]] = []
    size = 0
    for row, lanes in enumerate(inputs):
        if chunk and size + len(lanes) > max_rows:
            yield chunk
            chunk, size = [], 0
        chunk.append((row, lanes))
        size += len(lanes)
    if chunk:
        yield chunk
