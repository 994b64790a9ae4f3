"""What single tokens are worth, learnt from whole completions: ``objective.expected_gradient``.

A sampled token's advantage says nothing about the tokens that were not sampled, and says it with the noise of all the others
around it. Here a linear critic is fitted to the rewards of whole completions, from their tokens and from their states at once,
and, with ``objective.counterfactuals``, to what became of a reward when one token ``a`` was replaced by ``b``:

    R(completion) - mean of its group = x . u + h . v,    x = sum over its tokens of f(a) w_a,    h = mean of its hidden states
    R(b in place of a) - R(a)         = (f(b) w_b - f(a) w_a) . u

with ``w_a`` the token's row of the original output layer, centred and of length 1, and ``f(a)`` smaller for frequent tokens, which
say little. What is learnt of one word so holds for words like it. States live in the space that the rows read: a direction
along which completions of high reward lie makes their words likelier, so both parts judge a token,

    q(a) = f(a) w_a . (u + 2 v)

in units of reward; where tokens were replaced, which tells all that is needed, ``v`` is 0. The policy then follows the gradient of ``E_{a ~ pi}[q(a)]`` over *all* tokens of the shortlist at once, which
has no sampling noise at all: expected policy gradients (Ciosek & Whiteson 2018, eq. 7; Allen et al. 2017, Mean Actor-Critic, eq. 4).

``u`` and ``v`` are ridge regression whose data fade with every step; what it cannot tell, it holds to be worth nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.counterfactuals import Counterfactuals

#: Weight of what was learnt before, at every step. (Measured, as is all of this: see benchmarks/LOG.md.)
_FADING = 0.9
#: Ridge penalty; a completion's tokens, and its state, have length 1 on the average.
_PENALTY = 1.0
#: How much more a token is judged by ``v`` than the regression does.
_STATE_GAIN = 2.0
#: Tokens of a larger share of all count less, by this power.
_FREQUENT, _FREQUENT_POWER = 1e-3, 0.3
_FILE_NAME = "token_value.safetensors"
#: Rows of the vocabulary, or tokens, in float32 at once.
_BLOCK = 2048
_TINY = 1e-6


class TokenValue:
    """The linear critic, as the normal equations of its regression.

    Args:
        weight: output layer of the original model, ``(V, D)``; read, never copied.

    Attributes:
        correlation: between the rewards of the last rollout, within its groups, and what the critic said of its completions before
            it had seen them; 0 at first.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._mean = torch.stack([block.float().sum(dim=0) for block in self._weight.split(_BLOCK)]).sum(0)
        self._mean /= len(weight)
        self._norms = torch.cat(
            [(block.float() - self._mean).norm(dim=1) for block in self._weight.split(_BLOCK)]
        ).clamp(min=_TINY)
        width = weight.shape[1]
        self._known = {
            "gram": torch.zeros(2 * width, 2 * width),
            "moment": torch.zeros(2 * width),
            "direction": torch.zeros(2 * width),
            "lengths": torch.zeros(2),  # of the first rollout's features
            "counts": torch.zeros(len(weight)),
        }
        self.correlation = 0.0

    @torch.no_grad()
    def learn(
        self, tokens: TokenBatch, rewards: Tensor, groups: Tensor, edits: Counterfactuals | None = None
    ) -> Tensor:
        """Take note of a rollout and fit anew.

        Args:
            tokens: of the rollout, with their states.
            rewards: of its completions, ``(R,)``; NaN where unknown.
            groups: the prompt of each completion, ``(R,)``.
            edits: what the completions would have earned with other tokens.

        Returns:
            value of every token of the vocabulary, ``(V,)`` float32, in units of reward; mean 0 over the rollout's tokens.
        """
        known = self._known
        known["counts"] += torch.bincount(tokens.actions.cpu(), minlength=len(known["counts"]))
        features, rewards = self._completions(tokens, rewards.cpu().float(), groups.cpu())
        said = torch.stack([features @ known["direction"], rewards])
        self.correlation = (
            max(0.0, float(torch.corrcoef(said)[0, 1].nan_to_num())) if len(rewards) > 1 else 0.0
        )
        known["gram"] *= _FADING
        known["moment"] *= _FADING
        known["gram"] += features.T @ features
        known["moment"] += features.T @ rewards
        if edits is not None:
            self._learn_edits(tokens, edits)
        # Replaced tokens tell all that is needed: states would add noise.
        size = len(self._mean) if edits is not None else len(known["moment"])
        regularised = known["gram"][:size, :size] + _PENALTY * torch.eye(size)
        moment = known["moment"][:size].unsqueeze(1)
        known["direction"] = torch.zeros_like(known["direction"])
        known["direction"][:size] = torch.cholesky_solve(moment, torch.linalg.cholesky(regularised)).squeeze(
            1
        )
        return self._values(tokens.actions)

    def _completions(self, tokens: TokenBatch, rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """``[x, h]`` ``(R, 2 D)`` and rewards ``(R,)`` of the completions whose reward is known, centred within their groups."""
        count, width = len(rewards), len(self._mean)
        read, states = torch.zeros(count, width), torch.zeros(count, width)
        rows, actions = tokens.rows.cpu(), tokens.actions
        for start in range(0, len(tokens), _BLOCK):
            block = slice(start, start + _BLOCK)
            read.index_add_(0, rows[block], self._read(actions[block]).cpu())
            states.index_add_(0, rows[block], tokens.states[block, :width].float().cpu())
        states /= torch.bincount(rows, minlength=count).clamp(min=1).unsqueeze(1)

        known = ~rewards.isnan()
        names, at, sizes = torch.unique(groups[known], return_inverse=True, return_counts=True)
        columns = torch.cat([read, states, rewards.unsqueeze(1)], dim=1)[known]
        means = torch.zeros(len(names), columns.shape[1]).index_add_(0, at, columns) / sizes.unsqueeze(1)
        columns = columns - means[at]
        features, lengths = columns[:, :-1].unflatten(1, (2, width)), self._known["lengths"]
        if not lengths.any() and len(features):
            found = features.norm(dim=2).mean(dim=0)
            if bool((found > _TINY).all()):  # completions that are all alike have no length
                lengths += found
        return (features / self._unit_lengths().unsqueeze(1)).flatten(1), columns[:, -1]

    def _unit_lengths(self) -> Tensor:
        """What features are divided by, ``(2,)``."""
        lengths = self._known["lengths"]
        return lengths if lengths.any() else torch.ones_like(lengths)

    def _learn_edits(self, tokens: TokenBatch, edits: Counterfactuals) -> None:
        width, scale = len(self._mean), self._unit_lengths()[0]
        parts = zip(
            edits.at.split(_BLOCK), edits.actions.split(_BLOCK), edits.changes.split(_BLOCK), strict=True
        )
        for at, actions, changes in parts:
            before = tokens.actions[at.to(tokens.actions.device)]
            moved = (self._read(actions.to(before.device)) - self._read(before)).cpu() / scale
            self._known["gram"][:width, :width] += moved.T @ moved
            self._known["moment"][:width] += moved.T @ changes

    def _read(self, actions: Tensor) -> Tensor:
        """``f(a) w_a`` of tokens, ``(N, D)``."""
        scale = (self._rarity().to(actions.device)[actions] / self._norms[actions]).unsqueeze(1)
        return (self._weight[actions].float() - self._mean) * scale

    def _rarity(self) -> Tensor:
        """``f(a)`` of all tokens, ``(V,)``."""
        share = self._known["counts"] / self._known["counts"].sum().clamp(min=1)
        return (_FREQUENT / (_FREQUENT + share)) ** _FREQUENT_POWER

    def _values(self, sampled: Tensor) -> Tensor:
        u, v = self._known["direction"].chunk(2)
        # In the weight's own precision: as floats, its rows take twenty times as long.
        direction = ((u + _STATE_GAIN * v) / self._unit_lengths()[0]).to(self._weight)
        rows = (self._weight @ direction.unsqueeze(1)).squeeze(1).float()
        values = (rows - self._mean @ direction.float()) / self._norms * self._rarity().to(rows.device)
        return values - values[sampled].mean()

    def save(self, folder: Path) -> None:
        """Write what it has learnt into a checkpoint's folder."""
        save_file({name: value.contiguous() for name, value in self._known.items()}, folder / _FILE_NAME)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            TeaError: if an earlier version wrote it, which learnt in another way.
        """
        known = load_file(folder / _FILE_NAME)
        if known.keys() != self._known.keys():
            raise TeaError(
                f"{folder} holds values of tokens the way an earlier version learnt them; start a new run in another folder"
            )
        self._known = known
