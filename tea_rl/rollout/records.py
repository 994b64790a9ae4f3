"""Collects what a multi-turn rollout records, turn by turn as it happens, and puts it in order at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tea_rl.head.layer import TeaHead
from tea_rl.rollout.choices import ChoiceBatch, choice_logps
from tea_rl.rollout.decode import score_tokens
from tea_rl.rollout.episode_batch import Turn
from tea_rl.rollout.trajectory import TokenBatch


@dataclass(frozen=True)
class Scored:
    """The listed choices in one state: records of their tokens, and the two policies over them, ``(C,)`` each."""

    tokens: TokenBatch
    texts: Sequence[str]
    logps: Tensor
    base_logps: Tensor


class Records:
    """Turns, the tokens of free ones, and the decisions between listed choices.

    Args:
        head: the policy.
        temperature: of the rollout.
    """

    def __init__(self, head: TeaHead, temperature: float) -> None:
        self._head, self._temperature = head, temperature
        self._turns: list[Turn] = []
        self._steps: list[TokenBatch] = []
        self._decisions: list[tuple[int, Scored, int]] = []
        self._num_states = 0

    def open(self, turn: Turn) -> int:
        """Take a new turn; returns its number until `close` gives it another."""
        self._turns.append(turn)
        return len(self._turns) - 1

    def add(self, step: TokenBatch, num_states: int) -> None:
        """Tokens whose ``rows`` are turn numbers and whose ``state_ids`` count ``num_states`` states from 0."""
        step.state_ids = step.state_ids + self._num_states
        self._num_states += num_states
        self._steps.append(step)

    def share(self, tokens: TokenBatch, texts: Sequence[str]) -> Scored:
        """Scored choices, which any number of decisions may be made between."""
        one = torch.zeros(len(texts), dtype=torch.long, device=tokens.rows.device)
        tokens.state_ids = tokens.state_ids + self._num_states
        self._num_states = int(tokens.state_ids.max()) + 1
        return Scored(
            tokens,
            texts,
            choice_logps(tokens.logps, tokens.rows, one),
            choice_logps(tokens.base_logps, tokens.rows, one),
        )

    def decide(self, turn: int, scored: Scored, chosen: int) -> None:
        """Choice ``chosen`` was taken in a turn."""
        self._decisions.append((turn, scored, chosen))

    def close(
        self, failed: Sequence[int], device: torch.device
    ) -> tuple[TokenBatch, ChoiceBatch | None, list[Turn]]:
        """Everything by episode, then turn, then position; without the tokens and decisions of ``failed`` episodes."""
        order = sorted(range(len(self._turns)), key=lambda n: (self._turns[n].episode, self._turns[n].turn))
        number = torch.empty(len(order), dtype=torch.long)
        number[order] = torch.arange(len(order))
        lost = set(failed)
        usable = torch.tensor([turn.episode not in lost for turn in self._turns], dtype=torch.bool)
        tokens = self._tokens(number.to(device), usable.to(device), device)
        decisions = [
            (int(number[turn]), scored, chosen) for turn, scored, chosen in self._decisions if usable[turn]
        ]
        decisions.sort(key=lambda decision: decision[0])
        return (
            tokens,
            _choice_batch(decisions, device) if decisions else None,
            [self._turns[n] for n in order],
        )

    def _tokens(self, number: Tensor, usable: Tensor, device: torch.device) -> TokenBatch:
        if not self._steps:
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            states = torch.zeros(0, self._head.state_width, dtype=self._head.weight.dtype, device=device)
            return score_tokens(self._head, states, nothing, nothing, self._temperature)
        tokens = TokenBatch.cat(self._steps)
        kept = usable[tokens.rows].nonzero().squeeze(1)
        tokens = tokens.select(kept[torch.argsort(number[tokens.rows[kept]], stable=True)])
        tokens.rows = number[tokens.rows]
        return tokens


def _choice_batch(decisions: Sequence[tuple[int, Scored, int]], device: torch.device) -> ChoiceBatch:
    parts, offsets, total = [], [], 0
    for _, scored, _ in decisions:
        part = scored.tokens.select(torch.arange(len(scored.tokens), device=device))
        part.rows = part.rows + total
        parts.append(part)
        offsets.append(total)
        total += len(scored.texts)
    logps = [scored.logps for _, scored, _ in decisions]
    base = [scored.base_logps for _, scored, _ in decisions]
    chosen = [choice for _, _, choice in decisions]
    sizes = torch.tensor([len(scored.texts) for _, scored, _ in decisions], device=device)
    return ChoiceBatch(
        tokens=TokenBatch.cat(parts),
        texts=[text for _, scored, _ in decisions for text in scored.texts],
        decision_of_choice=torch.arange(len(decisions), device=device).repeat_interleave(sizes),
        chosen=torch.tensor(offsets, device=device) + torch.tensor(chosen, device=device),
        turns=torch.tensor([turn for turn, _, _ in decisions], device=device),
        logps=torch.stack([own[choice] for own, choice in zip(logps, chosen, strict=True)]),
        base_logps=torch.stack([own[choice] for own, choice in zip(base, chosen, strict=True)]),
        kl=torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(logps, base, strict=True)]),
        entropy=torch.stack([-(p.exp() * p).sum() for p in logps]),
    )
