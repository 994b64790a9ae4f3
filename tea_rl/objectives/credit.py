"""Credit of single turns in episodes of many: returns-to-go, group baselines turn by turn, and GAE.

Shape letters: ``T`` turns, those of an episode side by side and in order; ``E`` episodes; ``L`` turns of the longest one.
Everywhere ``episode_of_turn`` ``(T,)`` counts episodes from 0; an episode without any turn (its environment failed at once)
is allowed and gets nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tea_rl.objectives.advantages import stored_advantages


class TurnCredit(NamedTuple):
    """What `gae` gives each turn, ``(T,)`` both: advantage, and the target of the value head there."""

    advantages: Tensor
    value_targets: Tensor


def discounted_returns(rewards: Tensor, episode_of_turn: Tensor, discount: float) -> Tensor:
    """Return-to-go of each turn: ``G_t = r_t + discount * G_{t+1}``, 0 after the last turn (Sutton & Barto 2018, eq. 3.9).

    Shape:
        rewards and episode_of_turn ``(T,)``; returns ``(T,)``.

    Raises:
        ValueError: if the turns of an episode are not side by side.

    >>> discounted_returns(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0, 0, 1]), 0.5).tolist()
    [1.0, 0.0, 4.0]
    >>> discounted_returns(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0, 0, 0]), 0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    grid = _Grid(episode_of_turn)
    return grid.turns(_discounted_sums(grid.rows(_as_float(rewards)), discount))


def turn_advantages(
    name: str, returns: Tensor, groups: Tensor, episode_of_turn: Tensor, scale: str = "group"
) -> Tensor:
    """Advantages of `stored_advantages`, turn by turn: each return-to-go against those of the other episodes of its group.

    Turn ``t`` is held against turn ``t`` of the others, or against their last one where they ended earlier. What the others
    did does not depend on this episode's actions, so the baseline of ``rloo`` leaves the gradient unbiased; and where a
    single reward ends the episode (discount 1), every turn gets the advantage of the whole episode.

    Args:
        name: objective by its recipe name: ``rloo`` leaves the episode itself out of its baseline, ``grpo`` takes the group's
            mean over a standard deviation, ``reinforce`` and ``ppo`` look at all episodes instead of the group.
        returns: `discounted_returns`, ``(T,)``.
        groups: numbers that episodes with the same start share, ``(E,)``.
        episode_of_turn: ``(T,)``.
        scale: as in `tea_rl.objectives.advantages.grpo_advantages`.

    Shape:
        returns ``(T,)``; 0 for an episode alone in its group (``grpo``, ``rloo``).

    Raises:
        ValueError: for an unknown name, or if the turns of an episode are not side by side.
    """
    grid = _Grid(episode_of_turn)
    returns = _as_float(returns)
    own_groups = groups[grid.episodes]
    rows = grid.rows(returns)
    rows = torch.where(grid.filled, rows, returns[grid.last_turns].unsqueeze(1))
    columns = [stored_advantages(name, column, own_groups, scale) for column in rows.unbind(dim=1)]
    return grid.turns(torch.stack(columns, dim=1)) if columns else returns.clone()


def gae(
    rewards: Tensor,
    values: Tensor,
    final_values: Tensor,
    terminated: Tensor,
    episode_of_turn: Tensor,
    discount: float,
    gae_lambda: float,
) -> TurnCredit:
    """Generalised advantage estimation per turn (Schulman et al. 2016, eq. 11 and 16).

        delta_t = r_t + discount * V_{t+1} - V_t,    A_t = delta_t + discount * gae_lambda * A_{t+1}

    Behind the last turn ``V`` is 0 if the episode terminated, else the value of its final state: where it was truncated
    (time limit, full context) and where the batch ends in its midst. The value head's target is ``A_t + V_t``. No gradient
    passes through any of it.

    Args:
        rewards: of each turn, ``(T,)``.
        values: of the states in which the turns were chosen, ``(T,)``.
        final_values: of the state each episode was left in, ``(E,)``; of no effect (NaN even) where it terminated.
        terminated: whether the environment itself ended the episode, ``(E,)`` bool.
        episode_of_turn: ``(T,)``.
        discount: of the next turn, 0 to 1.
        gae_lambda: 0 trusts the values (one turn of reward), 1 the rewards (return minus value).

    Raises:
        ValueError: if the turns of an episode are not side by side.
    """
    grid = _Grid(episode_of_turn)
    rewards, values = _as_float(rewards).detach(), _as_float(values).detach()
    bootstrap = _as_float(final_values).detach().masked_fill(terminated.bool(), 0.0)[grid.episodes]
    following = torch.zeros_like(values)
    following[:-1] = values[1:]
    following[grid.last_turns] = bootstrap.to(values.dtype)
    deltas = rewards + discount * following - values
    advantages = grid.turns(_discounted_sums(grid.rows(deltas), discount * gae_lambda))
    return TurnCredit(advantages, advantages + values)


class _Grid:
    """Turns as a table: a row an episode, a column a turn number; turns that never were hold 0.

    Attributes:
        episodes: number of the episode in each row, ``(R,)``; those without turns have no row.
        last_turns: number of each row's last turn, ``(R,)``.
        filled: where there is a turn, ``(R, L)``.
    """

    def __init__(self, episode_of_turn: Tensor) -> None:
        self.episodes, self._row, lengths = torch.unique_consecutive(
            episode_of_turn, return_inverse=True, return_counts=True
        )
        if len(self.episodes.unique()) < len(self.episodes):
            raise ValueError("the turns of an episode must be side by side")
        self.last_turns = lengths.cumsum(dim=0) - 1
        starts = self.last_turns + 1 - lengths
        self._column = torch.arange(len(episode_of_turn), device=episode_of_turn.device) - starts[self._row]
        longest = int(lengths.max()) if len(lengths) else 0
        self.filled = torch.arange(longest, device=starts.device) < lengths.unsqueeze(1)

    def rows(self, of_turns: Tensor) -> Tensor:
        """``(T,)`` to ``(R, L)``."""
        table = of_turns.new_zeros(self.filled.shape)
        table[self._row, self._column] = of_turns
        return table

    def turns(self, table: Tensor) -> Tensor:
        """``(R, L)`` to ``(T,)``."""
        return table[self._row, self._column]


def _discounted_sums(table: Tensor, factor: float) -> Tensor:
    """``s_l = x_l + factor * s_{l+1}`` along the columns, ``(R, L)``."""
    sums = torch.zeros_like(table)
    running = table.new_zeros(len(table))
    for column in range(table.shape[1] - 1, -1, -1):
        running = table[:, column] + factor * running
        sums[:, column] = running
    return sums


def _as_float(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.float()
