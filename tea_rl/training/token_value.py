"""What single tokens are worth, learnt from whole completions: ``objective.expected_gradient``.

A sampled token's advantage says nothing about the tokens that were not sampled, and says it with the noise of all the others
around it. Here a linear critic of token embeddings is fitted to the rewards,

    R(completion) - mean of its group = sum over its tokens of q(a),    q(a) = u . (e_a - mean e) / |e_a - mean e|

with ``e_a`` the token's row of the original output layer, so that what is learnt of one word holds for words like it. The
policy then follows the gradient of ``E_{a ~ pi}[q(a)]`` over *all* tokens of the shortlist at once, which has no sampling noise
at all: expected policy gradients (Ciosek & Whiteson 2018, eq. 7; Allen et al. 2017, Mean Actor-Critic, eq. 4).

``u`` is ridge regression on the completions of the last `_KEPT_STEPS` steps. What it explains of groups it has not seen
decides how loudly it speaks: values are scaled by that correlation, and where single tokens explain nothing they are zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.ridge import Ridge

NUM_FOLDS = 5
#: Ridge penalties, as a share of the features' mean squared length.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_KEPT_STEPS = 20
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
        self._kept = {
            "features": torch.zeros(0, width),
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
            tokens: of the rollout.
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
        features = torch.zeros(len(rewards), len(self._mean), device=self._mean.device)
        for rows, actions in zip(tokens.rows.split(_BLOCK), tokens.actions.split(_BLOCK), strict=True):
            unit = (self._weight[actions].float() - self._mean) / self._norms[actions].unsqueeze(1)
            features.index_add_(0, rows, unit)
        known = ~rewards.isnan()
        features, rewards, groups = features.cpu()[known], rewards[known], groups[known]
        names, at, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        means = torch.zeros(len(names), features.shape[1]).index_add_(0, at, features) / sizes.unsqueeze(1)
        reward_means = torch.zeros(len(names)).index_add_(0, at, rewards) / sizes
        first = int(self._kept["groups"].max()) + 1 if len(self._kept["groups"]) else 0
        new = {
            "features": features - means[at],
            "rewards": rewards - reward_means[at],
            "groups": at + first,
            "steps": torch.full_like(at, step),
        }
        recent = self._kept["steps"] > step - _KEPT_STEPS
        self._kept = {name: torch.cat([kept[recent], new[name]]) for name, kept in self._kept.items()}

    def _fit(self) -> Tensor:
        """The direction ``u`` at the penalty that errs least on groups left out, ``(D,)``; sets `correlation`."""
        features, rewards = self._kept["features"], self._kept["rewards"]
        fold = self._kept["groups"] % NUM_FOLDS
        self.correlation = 0.0
        if len(fold.unique()) < 2 or not bool(rewards.any()):
            return torch.zeros(features.shape[1])
        mean_square = features.square().sum() / len(features)
        penalties = (torch.tensor(PENALTIES) * mean_square).clamp(min=1e-6)
        fit = Ridge(features, rewards)
        said = fit.left_out(fold, penalties)
        best = int((said - rewards.unsqueeze(1)).square().sum(dim=0).argmin())
        both = torch.corrcoef(torch.stack([said[:, best], rewards]))[0, 1]
        self.correlation = max(0.0, float(both.nan_to_num()))
        return fit.weights(float(penalties[best]))

    def save(self, folder: Path) -> None:
        """Write what it learns from into a checkpoint's folder."""
        save_file({name: value.contiguous() for name, value in self._kept.items()}, folder / _FILE_NAME)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        self._kept = load_file(folder / _FILE_NAME)
