"""What an offline objective learns from a store: which rows, what each teaches, and which are held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tea_rl.data.split import split_groups
from tea_rl.errors import TeaError
from tea_rl.objectives.advantages import stored_advantages
from tea_rl.objectives.supervised import awr_weights
from tea_rl.recipe import DataConfig, ObjectiveConfig, Recipe, TrainConfig
from tea_rl.states.store import StateStore
from tea_rl.training.batches import RowPlan, TokenPlan
from tea_rl.training.offline_learner import PAIR_OBJECTIVES, ROW_OBJECTIVES, OfflineBatch

#: A column of the data that says itself which rows are held out.
SPLIT_COLUMN = "split"
_TRAINING, _HELD_OUT = ("train",), ("test", "eval", "validation", "held_out")


class OfflineData:
    """Training and held-out rows of a store, and the minibatches of every step.

    Args:
        store: the rows.
        recipe: gives the objective, the split and the size of a minibatch.

    Attributes:
        train_rows, eval_rows: row numbers; those of pairs to train on pair by pair, chosen first, the others ascending.
        signal: what each row of the store teaches, ``(rows,)`` float32, see `OfflineBatch`.
        steps_per_epoch: optimizer steps of one pass.
        num_tokens: tokens of one pass.
        left_out: rows that were not held out but teach nothing (without a reward, or the rejected ones of cross-entropy).

    Raises:
        TeaError: if the store lacks what the objective learns from, or there is nothing to learn.
    """

    def __init__(self, store: StateStore, recipe: Recipe) -> None:
        self.store, self.recipe = store, recipe
        objective = recipe.objective
        candidates, self.eval_rows = split_store(store, recipe.data)
        self.train_rows = _teaching_rows(store, objective, candidates)
        self.left_out = len(candidates) - len(self.train_rows)
        self.signal = torch.zeros(len(store))
        self.signal[self.train_rows] = row_signal(store, objective, self.train_rows)
        plan_arguments = (objective.minibatch_tokens, recipe.train.seed)
        self._plan: TokenPlan | RowPlan
        if objective.name in ROW_OBJECTIVES:
            units = self.train_rows.reshape(-1, 2 if objective.name in PAIR_OBJECTIVES else 1)
            self._plan = RowPlan(store.offsets, units, *plan_arguments)
        else:
            self._plan = TokenPlan(store.offsets, self.train_rows, *plan_arguments)
        self.steps_per_epoch, self.num_tokens = self._plan.steps_per_epoch, self._plan.num_tokens

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        epochs = self.recipe.train.num_train_epochs
        return self.recipe.train.max_steps if epochs is None else max(1, round(epochs * self.steps_per_epoch))

    def batch(self, step: int, generator: torch.Generator) -> OfflineBatch:
        """The minibatch of a step (from 1); ``generator`` draws token dropout and state noise."""
        train = self.recipe.train
        if isinstance(self._plan, RowPlan):
            rows = self._plan(step)
            index = self.store.token_index(rows)
            at = torch.from_numpy(np.repeat(np.arange(len(rows)), self.store.lengths[rows]))
        else:
            index = self._plan(step)
            numbers = np.searchsorted(self.store.offsets, index, side="right") - 1
            rows, places = np.unique(numbers, return_inverse=True)
            at = torch.from_numpy(places)
        if train.token_dropout > 0:
            kept = torch.rand(len(index), generator=generator) >= train.token_dropout
            if kept.any():
                index, at = index[kept.numpy()], at[kept]
        tokens = self.store.tokens(index=index)
        tokens.rows = at
        tokens.states = add_noise(tokens.states, train.state_noise, generator)
        return OfflineBatch(tokens, self.signal[rows], damping(self.store.lengths[rows], train), rows)


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


def split_store(store: StateStore, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out rows of a store, ascending.

    A column ``split`` of the data decides where there is one (``train``; ``test``, ``eval``, ``validation`` or
    ``held_out``); else rows are drawn by prompt, and pairs stay together.

    Raises:
        TeaError: if no row is left to train on, or a split has another name.
    """
    if len(store) == 0:
        raise TeaError(f"expected rows to learn from, but the store {store.path} holds none; embed some")
    if any(SPLIT_COLUMN in text["columns"] for text in store.texts()):
        sides: tuple[list[int], list[int]] = ([], [])
        for row, text in enumerate(store.texts()):
            sides[_side(text)].append(row)
        if not sides[0]:
            raise TeaError(f'expected rows whose column "{SPLIT_COLUMN}" is train, got none; mark some')
    else:
        sides = split_groups(store.groups.tolist(), data.eval_fraction, data.split_seed)
    train, held_out = (np.array(side, np.int64) for side in sides)
    if data.eval_size is not None:
        distinct = np.random.default_rng(data.split_seed).permutation(np.unique(store.groups[held_out]))
        held_out = held_out[np.isin(store.groups[held_out], distinct[: data.eval_size])]
    return train, held_out


def _side(text: dict[str, Any]) -> int:
    value = text["columns"].get(SPLIT_COLUMN)
    if value in _TRAINING:
        return 0
    if value in _HELD_OUT:
        return 1
    known = ", ".join((*_TRAINING, *_HELD_OUT))
    raise TeaError(
        f'{text["place"]}: column "{SPLIT_COLUMN}" must be one of {known}, got {value!r}; rename it'
    )


def _teaching_rows(store: StateStore, objective: ObjectiveConfig, rows: np.ndarray) -> np.ndarray:
    """Those of the rows that the objective can learn from; pair by pair, chosen first, for dpo and ipo."""
    name = objective.name
    if name in PAIR_OBJECTIVES:
        return _pairs(store, name, rows)
    if name == "kto":
        teaching = rows[_verdicts(store)[rows] >= 0]
        wanted = "labels (label: true or false) or preference pairs"
    elif name == "cross_entropy":
        teaching = rows[_verdicts(store)[rows] != 0]
        wanted = "texts that are not marked as bad"
    else:
        teaching = rows[~np.isnan(store.rewards[rows])]
        wanted = "rewards (a column reward, rewards in the recipe, or tea-rl relabel)"
    if not len(teaching):
        raise TeaError(
            f"objective.name {name} learns from {wanted}, but the training rows of {store.path} have none; label them or "
            "choose another objective"
        )
    return teaching


def _verdicts(store: StateStore) -> np.ndarray:
    """1 for good rows, 0 for bad ones, -1 where nobody said, from labels or from pairs."""
    return np.where(store.labels >= 0, store.labels, store.chosen)


def _pairs(store: StateStore, name: str, rows: np.ndarray) -> np.ndarray:
    paired = rows[store.pairs[rows] >= 0]
    # chosen (1) before rejected (0) within a pair
    order = np.lexsort((-store.chosen[paired].astype(np.int64), store.pairs[paired]))
    paired = paired[order]
    pairs, counts = np.unique(store.pairs[paired], return_counts=True)
    paired = paired[np.isin(store.pairs[paired], pairs[counts == 2])]  # both must have survived max_length
    if not len(paired):
        raise TeaError(
            f"objective.name {name} learns from preference pairs (chosen, rejected), but the training rows of {store.path} "
            "have none; give pairs or choose another objective"
        )
    return paired


def row_signal(store: StateStore, objective: ObjectiveConfig, rows: np.ndarray) -> torch.Tensor:
    """What each of the rows teaches, ``(R,)`` (see `OfflineBatch`).

    Raises:
        TeaError: if there is nothing to learn.
    """
    name = objective.name
    if name in ("cross_entropy", *PAIR_OBJECTIVES):
        return torch.ones(len(rows))
    if name == "kto":
        return torch.from_numpy(_verdicts(store)[rows]).float()
    rewards = torch.from_numpy(store.rewards[rows]).float()
    groups = torch.from_numpy(store.groups[rows])
    if bool((rewards == rewards[0]).all()):
        raise TeaError(
            f"nothing to learn: all {len(rows)} training rows of {store.path} have the reward {rewards[0]:g}; give rewards "
            "that differ, or objective.name cross_entropy to learn every row alike"
        )
    if name == "reward_weighted":
        return rewards
    if name == "awr":
        return awr_weights(rewards, groups, objective.beta, torch.from_numpy(store.lengths[rows]))
    advantages = stored_advantages(name, rewards, groups, objective.scale_rewards)
    if not bool(advantages.any()):
        raise TeaError(
            f"nothing to learn: objective.name {name} compares the completions of a prompt, but no two of the same prompt "
            f"differ in reward in {store.path}; use objective.name awr or reinforce, or store several completions of each"
        )
    return advantages
