"""Which tokens of a stored completion earned its reward: ``objective.token_credit``.

A reward of a whole completion says nothing about its single tokens: weighing all of them alike drowns the few that matter.
The cached states tell more. A linear critic ``V`` is fitted to them, and a token's advantage is by how much it changed what
is to be expected,

    A_t = V(s_{t+1}) - V(s_t)

which is generalised advantage estimation (Schulman et al. 2016, eq. 11 and 16) with lambda = 0, discount 1 and the reward at
the end. The last token gets 0: its ``R - V(s_T)`` is what the critic cannot explain, and would be blamed on the end of the text.

``V`` is ridge regression of the completion's reward on the normalised state, five-fold cross-fitted: no completion's own reward
enters the values along it. The penalty is the one of `PENALTIES` with the least error on the folds left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tea_rl.errors import TeaError
from tea_rl.states.store import StateStore
from tea_rl.training.ridge import ridge_weights

NUM_FOLDS = 5
#: Ridge penalties, as a share of the number of tokens (normalised features have variance 1).
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: States in memory at once.
_CHUNK = 16384


@dataclass
class TokenCredit:
    """What the critic found.

    Attributes:
        advantages: of every token of the store, mean 0 and standard deviation 1 over the rows that were given; 0 elsewhere,
            ``(tokens,)`` float32.
        correlation: between the rewards and what the critic expects of completions it has not seen, at their last state.
        penalty: the one of `PENALTIES` that was chosen.
    """

    advantages: Tensor
    correlation: float
    penalty: float

    def describe(self) -> str:
        """A line for users."""
        return (
            f"the critic expects rewards that correlate at {self.correlation:.2f} with those of completions it has not seen; what "
            "changes its mind is what earned the reward"
        )


def token_credit(store: StateStore, rows: np.ndarray, rewards: np.ndarray, seed: int) -> TokenCredit:
    """Advantages of the tokens of some rows.

    Memory does not grow with the store but for a few numbers a token; the states are read three times.

    Args:
        store: the states.
        rows: row numbers, ascending; none may be without a reward.
        rewards: of every row of the store, ``(rows of the store,)``.
        seed: decides which rows share a fold.

    Raises:
        TeaError: if there are fewer rows than folds, or no completion has two tokens.
    """
    if len(rows) < NUM_FOLDS or store.lengths[rows].max() < 2:
        raise TeaError(
            f"objective.token_credit needs at least {NUM_FOLDS} completions with a reward, one of them of two tokens or more, got "
            f"{len(rows)} of at most {store.lengths[rows].max()}; set it to 0"
        )
    folds = np.random.default_rng(seed).permutation(len(rows)) % NUM_FOLDS
    wanted = torch.from_numpy(rewards[rows]).double()
    critic = _Ridge.fit(store, rows, folds, wanted)
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for features, at, fold in _chunks(store, rows, folds):
        errors += (critic.values(features, fold) - wanted[at].unsqueeze(1)).square().sum(dim=0)
    best = int(errors.argmin())
    chunks = _chunks(store, rows, folds)
    value = torch.cat([critic.values(features, fold)[:, best] for features, _, fold in chunks])
    last = torch.from_numpy(store.lengths[rows]).cumsum(dim=0) - 1

    advantages = torch.cat([value[1:], value[-1:]]) - value
    advantages[last] = 0.0
    advantages = (advantages - advantages.mean()) / advantages.std().clamp(min=1e-8)
    found = torch.zeros(store.num_tokens)
    found[torch.from_numpy(store.token_index(rows))] = advantages.float()
    ends = torch.stack([value[last], wanted])
    return TokenCredit(found, float(torch.corrcoef(ends)[0, 1].nan_to_num()), PENALTIES[best])


class _Ridge:
    """One linear critic for every fold left out and every penalty.

    Args:
        weights: ``(folds, features, penalties)``.
        offset: what is added to every answer, the mean reward of a token.
    """

    def __init__(self, weights: Tensor, offset: float) -> None:
        self.weights, self.offset = weights, offset

    @classmethod
    def fit(cls, store: StateStore, rows: np.ndarray, folds: np.ndarray, rewards: Tensor) -> _Ridge:
        """From the normal equations of all folds, minus those of the one left out."""
        lengths = torch.from_numpy(store.lengths[rows])
        offset = float((rewards * lengths).sum() / lengths.sum())
        size = store.width + 1
        gram = torch.zeros(NUM_FOLDS, size, size, dtype=torch.float64)
        moment = torch.zeros(NUM_FOLDS, size, dtype=torch.float64)
        counts = torch.zeros(NUM_FOLDS, dtype=torch.float64)
        for features, at, fold in _chunks(store, rows, folds):
            wanted = (rewards - offset)[at]
            for number in range(NUM_FOLDS):
                own = fold == number
                x = features[own]
                gram[number] += (x.T @ x).double()
                moment[number] += x.T.double() @ wanted[own]
                counts[number] += len(x)
        weights = []
        for number in range(NUM_FOLDS):
            others = torch.arange(NUM_FOLDS) != number
            matrix, vector, count = gram[others].sum(0), moment[others].sum(0), counts[others].sum()
            weights.append(
                ridge_weights(matrix, vector, count * torch.tensor(PENALTIES, dtype=torch.float64))
            )
        return cls(torch.stack(weights), offset)

    def values(self, features: Tensor, folds: Tensor) -> Tensor:
        """Of tokens by the critics that have not seen their rows, ``(N, penalties)`` float64."""
        found = torch.zeros(len(features), len(PENALTIES), dtype=torch.float64)
        for number in range(NUM_FOLDS):
            own = folds == number
            found[own] = features[own].double() @ self.weights[number]
        return found + self.offset


def _chunks(
    store: StateStore, rows: np.ndarray, folds: np.ndarray
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features ``(N, W + 1)``, place of the row in ``rows`` and fold of consecutive tokens, a bounded number at a time."""
    ends = np.cumsum(store.lengths[rows])
    first = 0
    while first < len(rows):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _CHUNK, "right")))
        places = np.arange(first, last)
        states = store.tokens(index=store.token_index(rows[places])).states.float()
        blocks = states.unflatten(-1, (-1, store.hidden_size))
        normed = F.layer_norm(blocks, blocks.shape[-1:]).flatten(-2)
        at = torch.from_numpy(np.repeat(places, store.lengths[rows[places]]))
        yield torch.cat([normed, torch.ones(len(normed), 1)], dim=1), at, torch.from_numpy(folds)[at]
        first = last
