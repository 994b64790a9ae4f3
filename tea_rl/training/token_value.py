"""What single tokens are worth, learnt from whole completions: ``objective.expected_gradient``.

A sampled token's advantage says nothing about the tokens that were not sampled, and says it with the noise of all the others
around it. Here a linear critic is fitted to the rewards of whole completions, from their tokens and from their states at once:

    R(completion) - mean of its group = x . u + h . v,    x = sum over its tokens of f(a) w_a,    h = mean of its hidden states

with ``w_a`` the token's row of the original output layer, centred and of length 1, and ``f(a)`` smaller for frequent tokens, which
say little. What is learnt of one word so holds for words like it. States live in the space that the rows read: a direction
along which completions of high reward lie makes their words likelier, so both parts judge a token,

    q(a) = w_a . (u + 2 v)

The policy then follows the gradient of ``E_{a ~ pi}[q(a)]`` over *all* tokens of the shortlist at once, which has no sampling
noise at all: expected policy gradients (Ciosek & Whiteson 2018, eq. 7; Allen et al. 2017, Mean Actor-Critic, eq. 4).

``u`` and ``v`` are ridge regression on the completions of the last `_KEPT_STEPS` steps. What they explain of groups they have not
seen decides how loudly the critic speaks: values are scaled by that correlation, and where it can tell nothing they are zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.ridge import Ridge

NUM_FOLDS = 5
#: Ridge penalties, as a share of the features' mean squared length.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_KEPT_STEPS = 12
#: How much more a token is judged by ``v`` than the regression does. (Measured, as is all of this: see benchmarks/LOG.md.)
_STATE_GAIN = 2.0
#: Tokens of a larger share of all count less, by this power.
_FREQUENT, _FREQUENT_POWER = 1e-3, 0.3
_FILE_NAME = "token_value.safetensors"
#: Rows of the vocabulary, or tokens, in float32 at once.
_BLOCK = 2048
#: Below this share of the vocabulary's, the spread of the sampled tokens' values is as good as none.
_LEAST_SPREAD = 1e-3


class TokenValue:
    """The linear critic with the completions it learns from.

    Args:
        weight: output layer of the original model, ``(V, D)``; read, never copied.

    Attributes:
        correlation: between rewards and what the critic says of completions whose groups it has not seen; 0 at first.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._mean = torch.stack([block.float().sum(dim=0) for block in self._weight.split(_BLOCK)]).sum(0)
        self._mean /= len(weight)
        self._norms = torch.cat(
            [(block.float() - self._mean).norm(dim=1) for block in self._weight.split(_BLOCK)]
        ).clamp(min=1e-6)
        width = weight.shape[1]
        self._counts = torch.zeros(len(weight), device=weight.device)
        self._kept = {
            "tokens": torch.zeros(0, width),
            "states": torch.zeros(0, width),
            "rewards": torch.zeros(0),
            "groups": torch.zeros(0, dtype=torch.long),
            "steps": torch.zeros(0, dtype=torch.long),
        }
        self.correlation = 0.0

    @torch.no_grad()
    def learn(self, step: int, tokens: TokenBatch, rewards: Tensor, groups: Tensor) -> Tensor:
        """Take note of a rollout and fit anew.

        Args:
            step: number of the training step; each is noted once.
            tokens: of the rollout, with their states.
            rewards: of its completions, ``(R,)``; NaN where unknown.
            groups: the prompt of each completion, ``(R,)``.

        Returns:
            value of every token of the vocabulary, ``(V,)`` float32: mean 0 over the rollout's tokens and standard deviation
            `correlation`; all 0 where nothing can be told, or hardly any two sampled tokens differ in value.
        """
        self._note(step, tokens, rewards.cpu().float(), groups.cpu())
        direction = self._fit()
        values = self._weight.new_zeros(len(self._weight), dtype=torch.float32)
        if self.correlation <= 0.0:
            return values
        direction = direction.to(self._weight.device)
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            rows = self._weight[block].float() @ direction - self._mean @ direction
            values[block] = rows / self._norms[block]
        sampled = values[tokens.actions]
        spread = sampled.std(correction=0)
        # A policy that says one thing has nothing to choose between.
        if spread < _LEAST_SPREAD * values.std():
            return torch.zeros_like(values)
        return (values - sampled.mean()) * (self.correlation / spread)

    def _note(self, step: int, tokens: TokenBatch, rewards: Tensor, groups: Tensor) -> None:
        """Add a rollout, centred within its groups, and drop what is too old."""
        known = ~rewards.isnan()
        rewards, groups = rewards[known], groups[known]
        read, states = (part.cpu()[known] for part in self._features(tokens, len(known)))
        names, at, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        columns = torch.cat([read, states, rewards.unsqueeze(1)], dim=1)
        means = torch.zeros(len(names), columns.shape[1]).index_add_(0, at, columns) / sizes.unsqueeze(1)
        width = read.shape[1]
        read, states, rewards = (columns - means[at]).split([width, width, 1], dim=1)
        first = int(self._kept["groups"].max()) + 1 if len(self._kept["groups"]) else 0
        new = {
            "tokens": read,
            "states": states,
            "rewards": rewards.squeeze(1),
            "groups": at + first,
            "steps": torch.full_like(at, step),
        }
        recent = self._kept["steps"] > step - _KEPT_STEPS
        self._kept = {name: torch.cat([kept[recent], new[name]]) for name, kept in self._kept.items()}

    def _features(self, tokens: TokenBatch, count: int) -> tuple[Tensor, Tensor]:
        """``x`` and ``h`` of completions, ``(count, D)`` each."""
        device, width = self._mean.device, len(self._mean)
        self._counts.index_add_(0, tokens.actions, torch.ones(len(tokens.actions), device=device))
        read, states = torch.zeros(count, width, device=device), torch.zeros(count, width, device=device)
        share = self._counts / self._counts.sum()
        for start in range(0, len(tokens), _BLOCK):
            block = slice(start, start + _BLOCK)
            rows, actions = tokens.rows[block], tokens.actions[block]
            rare = (_FREQUENT / (_FREQUENT + share[actions])) ** _FREQUENT_POWER
            unit = (self._weight[actions].float() - self._mean) * (rare / self._norms[actions]).unsqueeze(1)
            read.index_add_(0, rows, unit)
            states.index_add_(0, rows, tokens.states[block, :width].float())
        lengths = torch.bincount(tokens.rows, minlength=count).clamp(min=1)
        return read, states / lengths.unsqueeze(1)

    def _fit(self) -> Tensor:
        """The direction ``u + 2 v`` at the penalty that errs least on groups left out, ``(D,)``; sets `correlation`."""
        parts, rewards = (self._kept["tokens"], self._kept["states"]), self._kept["rewards"]
        fold = self._kept["groups"] % NUM_FOLDS
        self.correlation = 0.0
        if len(fold.unique()) < 2 or not bool(rewards.any()):
            return torch.zeros(parts[0].shape[1])
        # Both parts as long as each other, on the average.
        features = torch.cat([part / part.norm(dim=1).mean().clamp(min=1e-6) for part in parts], dim=1)
        mean_square = features.square().sum() / len(features)
        penalties = (torch.tensor(PENALTIES) * mean_square).clamp(min=1e-6)
        fit = Ridge(features, rewards)
        said = fit.left_out(fold, penalties)
        best = int((said - rewards.unsqueeze(1)).square().sum(dim=0).argmin())
        both = torch.corrcoef(torch.stack([said[:, best], rewards]))[0, 1]
        self.correlation = max(0.0, float(both.nan_to_num()))
        u, v = fit.weights(float(penalties[best])).chunk(2)
        return u + _STATE_GAIN * v

    def save(self, folder: Path) -> None:
        """Write what it learns from into a checkpoint's folder."""
        kept = {**self._kept, "counts": self._counts}
        save_file({name: value.contiguous() for name, value in kept.items()}, folder / _FILE_NAME)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            TeaError: if an earlier version wrote it, which learnt from tokens alone.
        """
        self._kept = load_file(folder / _FILE_NAME)
        if "counts" not in self._kept:
            raise TeaError(
                f"{folder} holds values of tokens the way an earlier version learnt them; start a new run in another folder"
            )
        self._counts = self._kept.pop("counts").to(self._mean.device)
