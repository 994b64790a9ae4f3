"""Turns to update: those written freely, token by token, and those decided between listed choices, in the same minibatches."""

from __future__ import annotations

import torch
from torch import Tensor

from tea_rl.rollout.choices import ChoiceBatch, choice_divergence, choice_logps
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.learner import Learner, Part, UpdateReport


class TurnLearner(Learner):
    """A `Learner` of episodes.

    The log-probability of a written turn is the sum of its tokens', that of a decision is one number: with one record for each
    token and for each decision, every turn's log-probability weighs the same.
    """

    def update_turns(
        self, tokens: TokenBatch, choices: ChoiceBatch | None, advantages: Tensor, generator: torch.Generator
    ) -> UpdateReport:
        """`update` for the turns of a rollout; at decisions the anchor is the distance between the two policies over choices.

        Args:
            tokens: of turns written freely, their ``rows`` the numbers of the turns; may be empty if there are choices.
            choices: the other turns; None if there are none.
            advantages: of each turn, ``(T,)``.
            generator: orders the minibatches.
        """
        if choices is None:
            return self.update(tokens, advantages[tokens.rows], generator)
        written, decided = len(tokens), len(choices)

        def part(index: Tensor) -> Part:
            parts = []
            if len(free := index[index < written]):
                parts.append(self._written(tokens.select(free), advantages))
            if len(chosen := index[index >= written] - written):
                parts.append(self._decided(choices.select(chosen), advantages))
            return Part(*(torch.cat(column) for column in zip(*(part[:5] for part in parts), strict=True)))

        tokens_each = max(1.0, (written + len(choices.tokens)) / (written + decided))
        size = max(1, round(self.objective.minibatch_tokens / tokens_each))
        return self._descend(written + decided, size, part, generator)

    def _written(self, batch: TokenBatch, advantages: Tensor) -> Part:
        terms = self._terms(batch)
        return Part(terms.logps, batch.logps, advantages[batch.rows], terms.anchor, terms.entropy)

    def _decided(self, batch: ChoiceBatch, advantages: Tensor) -> Part:
        logps, anchor, entropy = decision_terms(
            batch, self._terms(batch.tokens).logps, self.anchor.divergence
        )
        return Part(logps, batch.logps, advantages[batch.turns], anchor, entropy)


def decision_terms(batch: ChoiceBatch, token_logps: Tensor, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the choice taken, distance to the original policy over choices and entropy over them, ``(Q,)`` each.

    ``token_logps`` are those of ``batch.tokens`` under a head, ``(N,)``; differentiable in them.
    """
    places = (batch.tokens.rows, batch.decision_of_choice)
    own = choice_logps(token_logps, *places)
    distance = choice_divergence(divergence, token_logps, batch.tokens.base_logps, *places)
    entropy = torch.zeros_like(distance).index_add(0, batch.decision_of_choice, -own.exp() * own)
    return own[batch.chosen], distance, entropy
