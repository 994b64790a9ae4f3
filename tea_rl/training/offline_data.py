"""What an offline objective learns from a store: which rows, what each teaches, and which are held out."""

from __future__ import annotations

import numpy as np
import torch

from tea_rl.evaluation.offline import RowFigures, row_figures
from tea_rl.head.layer import TeaHead
from tea_rl.objectives.advantages import stored_advantages
from tea_rl.objectives.supervised import awr_weights
from tea_rl.recipe import ObjectiveConfig, Recipe, TrainConfig
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.store import StateStore
from tea_rl.training.batches import ReturnPlan, RowPlan, TokenPlan
from tea_rl.training.offline_learner import PAIR_OBJECTIVES, ROW_OBJECTIVES, OfflineBatch
from tea_rl.training.offline_rows import RowTable
from tea_rl.training.read_ahead import ReadAhead
from tea_rl.training.token_credit import token_credit

#: One row of the anchor's text in so many is held out, to measure how far the policy moved where it should not.
HELD_OUT_EVERY = 8


class OfflineData:
    """Training and held-out rows of a store, and the minibatches of every step.

    Args:
        store: the rows.
        recipe: gives the objective, the split and the size of a minibatch.
        anchor: ordinary text to be held to the original model on; None: the rows themselves.

    Attributes:
        train_rows, eval_rows: row numbers; those of pairs to train on pair by pair, chosen first, the others ascending.
        signal: what each row of the store teaches, ``(rows,)`` float32, see `OfflineBatch`.
        credit: what each token earned, with ``objective.token_credit``.
        steps_per_epoch: optimizer steps of one pass.
        num_tokens: tokens of one pass.
        left_out: a line about rows that were not held out but teach nothing (without a reward, or the rejected ones of
            cross-entropy); None if there are none.

    Raises:
        TeaError: if the store lacks what the objective learns from, or there is nothing to learn.
    """

    def __init__(self, store: StateStore, recipe: Recipe, anchor: StateStore | None = None) -> None:
        self.store, self.recipe = store, recipe
        objective = recipe.objective
        self.table = RowTable.of_store(store)
        candidates, self.eval_rows = self.table.split(recipe.data)
        self.train_rows = self.table.teaching(objective, candidates)
        self.left_out = self.table.left_out(objective, candidates, self.train_rows)
        self.signal = self.signal_of(objective)
        self.credit, self.token_signal = None, None
        if objective.token_credit > 0:
            self.credit = token_credit(store, self.train_rows, self.table.rewards, recipe.train.seed)
            self.token_signal = self._mixed_signal(objective.token_credit)
        plan_arguments = (objective.minibatch_tokens, recipe.train.seed)
        self._plan: TokenPlan | RowPlan
        if objective.name in ROW_OBJECTIVES:
            units = self.train_rows.reshape(-1, 2 if objective.name in PAIR_OBJECTIVES else 1)
            self._plan = RowPlan(store.offsets, units, *plan_arguments)
        else:
            self._plan = TokenPlan(store.offsets, self.train_rows, *plan_arguments)
        self.steps_per_epoch, self.num_tokens = self._plan.steps_per_epoch, self._plan.num_tokens
        self._read = ReadAhead(store, self._token_index, self.total_steps)
        self.anchor = None if anchor is None else AnchorText(anchor, recipe, self.total_steps)
        self._returns = ReturnPlan(self.table.rewards, recipe.train.return_dropout, recipe.train.seed)

    def fit_returns(self, head: TeaHead) -> None:
        """Give a fresh head with ``return_conditioning`` the scale of the training returns; any other is left as it is.

        Raises:
            TeaError: if it cannot learn from them.
        """
        if head.config.return_conditioning:
            found = self.table.returns(self.recipe.objective, self.train_rows)
            head.fit_returns(torch.from_numpy(found))

    def _mixed_signal(self, share: float) -> torch.Tensor:
        """What each token of the store is weighed by: its completion's signal and its own advantage, equally scaled."""
        assert self.credit is not None
        of_completion = self.signal.repeat_interleave(torch.from_numpy(self.store.lengths))
        taught = of_completion[torch.from_numpy(self.store.token_index(self.train_rows))]
        return (1.0 - share) * of_completion + share * taught.std() * self.credit.advantages

    def signal_of(self, objective: ObjectiveConfig) -> torch.Tensor:
        """What each row of the store teaches another objective of the same name, ``(rows,)``; 0 for the others."""
        signal = torch.zeros(len(self.store))
        lengths = self.store.lengths[self.train_rows]
        signal[self.train_rows] = row_signal(self.table, objective, self.train_rows, lengths)
        return signal

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        epochs = self.recipe.train.num_train_epochs
        return self.recipe.train.max_steps if epochs is None else max(1, round(epochs * self.steps_per_epoch))

    def _token_index(self, step: int) -> np.ndarray:
        """Tokens of a step (from 1)."""
        found = self._plan(step)
        return self.store.token_index(found) if isinstance(self._plan, RowPlan) else found

    def batch(self, step: int, generator: torch.Generator) -> OfflineBatch:
        """The minibatch of a step (from 1); ``generator`` draws token dropout and state noise."""
        train = self.recipe.train
        tokens = self._read(step)
        if isinstance(self._plan, RowPlan):
            rows = self._plan(step)
            tokens.rows = torch.from_numpy(np.repeat(np.arange(len(rows)), self.store.lengths[rows]))
        else:
            rows, places = np.unique(tokens.rows.numpy(), return_inverse=True)
            tokens.rows = torch.from_numpy(places)
        if train.token_dropout > 0:
            kept = torch.rand(len(tokens), generator=generator) >= train.token_dropout
            if kept.any():
                tokens = tokens.select(kept)
        at, index = tokens.rows, tokens.state_ids
        tokens.states = add_noise(tokens.states, train.state_noise, generator)
        token_signal = None if self.token_signal is None else self.token_signal[index]
        num_anchor = 0
        if self.anchor is not None:
            text = self.anchor.tokens(step)
            text.state_ids = text.state_ids + self.store.num_tokens  # other states than the store's
            tokens, num_anchor = TokenBatch.cat([tokens, text]), len(text)
        returns = torch.from_numpy(self._returns(step, rows, at.numpy(), num_anchor))
        weights = damping(self.store.lengths[rows], train)
        return OfflineBatch(tokens, self.signal[rows], weights, rows, returns, token_signal, num_anchor)

    def anchor_metrics(self, head: TeaHead) -> dict[str, float]:
        """``eval_anchor_kl``, KL(head || original model) on held-out ordinary text (nats a token); empty without such text."""
        if self.anchor is None:
            return {}
        # Ordinary text has no return: it is asked those of the training rows, one after another.
        returns = np.resize(self.table.rewards[self.train_rows], len(self.anchor.eval_rows))
        text = row_figures([head], self.anchor.store, self.anchor.eval_rows, returns)[0]
        return {"eval_anchor_kl": float(text.kl.sum() / text.tokens.sum())}

    def return_metrics(self, head: TeaHead, figures: RowFigures) -> dict[str, float]:
        """``eval_return_gain``: what a held-out row's log-probability gains by asking for its own return instead of for none (nats
        a token); 0 for a head that takes no notice. Empty without ``return_conditioning``.

        Args:
            figures: of the held-out rows, each at its own return.
        """
        if not head.config.return_conditioning:
            return {}
        unasked = row_figures([head], self.store, self.eval_rows, np.full(len(self.eval_rows), np.nan))[0]
        return {"eval_return_gain": float((figures.logps - unasked.logps).sum() / figures.tokens.sum())}


class AnchorText:
    """Ordinary text beside the rows that teach: some tokens of it in every step, and a part held out.

    Args:
        store: its states.
        recipe: gives the seed and the size of a minibatch.
        last_step: of the run.

    Attributes:
        eval_rows: row numbers of the held-out part, one in `HELD_OUT_EVERY`.
        tokens: those of a step (from 1).
    """

    def __init__(self, store: StateStore, recipe: Recipe, last_step: int) -> None:
        self.store = store
        rows = np.arange(len(store))
        held_out = rows % HELD_OUT_EVERY == 1
        self.eval_rows = rows[held_out]
        plan = TokenPlan(store.offsets, rows[~held_out], recipe.anchor.minibatch_tokens, recipe.train.seed)
        self.tokens = ReadAhead(store, plan, last_step)


def add_noise(states: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise on each feature, as a share of its standard deviation over the batch.

    A head on a shortlist keeps the reference logits of the clean state; one on the whole vocabulary computes them from the
    noisy one. Shape ``(N, W)`` to ``(N, W)``.
    """
    if share == 0 or len(states) < 2:
        return states
    spread = states.float().std(dim=0)
    noise = torch.randn(states.shape, generator=generator) * (share * spread)
    return (states.float() + noise).to(states.dtype)


def damping(lengths: np.ndarray, train: TrainConfig) -> torch.Tensor:
    """Weights of rows: 1, or less for answers shorter than ``short_answer_damping`` tokens. Shape ``(R,)``."""
    weights = torch.ones(len(lengths))
    if train.short_answer_damping > 0:
        weights = (torch.from_numpy(lengths).float() / train.short_answer_damping).clamp(max=1.0)
    return weights


def row_signal(
    table: RowTable, objective: ObjectiveConfig, rows: np.ndarray, lengths: np.ndarray
) -> torch.Tensor:
    """What each of the rows teaches, ``(R,)`` (see `OfflineBatch`).

    Args:
        rows: as `RowTable.teaching` gives them.
        lengths: tokens of each of them, ``(R,)``.
    """
    name = objective.name
    if name in ("cross_entropy", *PAIR_OBJECTIVES):
        return torch.ones(len(rows))
    if name == "kto":
        return torch.from_numpy(table.verdicts[rows]).float()
    rewards = torch.from_numpy(table.rewards[rows]).float()
    groups = torch.from_numpy(table.groups[rows])
    if name == "reward_weighted":
        return rewards
    if name == "awr":
        return awr_weights(rewards, groups, objective.beta, torch.from_numpy(lengths))
    return stored_advantages(name, rewards, groups, objective.scale_rewards)
