"""Conditioning on a desired return: it modulates the norm through which members read a state.

After the Return-Aligned Decision Transformer (Tanaka et al. 2024, arXiv:2402.03923), whose point is that a return which is one
input among hundreds is ignored: here it scales and shifts every feature a member sees, so nothing is read past it. For a
normalised state ``x`` and the members' own scale ``s`` and shift ``t``,

    x (s + gamma(R)) + t + beta(R),     (gamma, beta)(R) = RETURN_GAIN phi(u) G,     u = asinh((R - mean) / std),

    phi(u) = (u,  sin(f u) / f,  cos(f u) / f  for f in FREQUENCIES)

with ``mean`` and ``std`` of the training returns. ``asinh`` keeps returns far from them apart without letting any of them
overwhelm the members; the waves tell neighbouring returns apart, and all have slopes of at most 1. ``G`` starts at zero: a
fresh head takes no notice of the return. An unknown return (None, or NaN in a row) modulates nothing at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tea_rl.errors import TeaError

#: Of the waves, in radians per (squashed) standard deviation of the returns.
FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
#: A handful of numbers stand against hundreds of state features that all learn at one rate, so they are read at this gain.
#: Measured (576 features, five returns that alone decide the label, 2,000 states, AdamW 1e-3, 300 steps): the asked label gets
#: 0.64 of the probability at gain 1, 0.94 at 3 and 0.99 at 10; labels that hang on the state as well are learnt as fast at 10.
RETURN_GAIN = 10.0
#: ``P``, numbers that describe a return.
NUM_FEATURES = 1 + 2 * len(FREQUENCIES)


class ReturnModulation(nn.Module):
    """What a desired return adds to scale and shift of every member's input norm.

    Args:
        num_members: ``K``.
        num_features: ``F``, features a member sees.

    Attributes:
        mean, std, low, high: of the training returns, ``()``, saved with the weights; see `fit`. The last two are the least and
            the greatest of them, NaN before `fit`.
        gain: ``G``, ``(K, P, 2 F)``, zero at first.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, num_members: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("low", torch.full((), torch.nan))
        self.register_buffer("high", torch.full((), torch.nan))
        self.gain = nn.Parameter(torch.zeros(num_members, NUM_FEATURES, 2 * num_features))

    def fit(self, returns: Tensor) -> None:
        """Take mean, standard deviation and range of the training returns; NaN (unknown) is passed over.

        Raises:
            TeaError: if no return is known, or one is infinite.
        """
        known = returns.detach().flatten().double()
        known = known[~known.isnan()]
        if len(known) == 0 or not bool(known.isfinite().all()):
            raise TeaError(
                f"return conditioning needs finite training returns, got {len(known)} known ones"
                + (", some infinite" if len(known) else "")
                + "; label the data with rewards"
            )
        spread = known.std(correction=0)
        self.mean.copy_(known.mean())
        self.std.copy_(spread if float(spread) > 0.0 else torch.ones(()))
        self.low.copy_(known.min())
        self.high.copy_(known.max())

    def beyond_training(self, value: float) -> str | None:
        """A line about a return that lies outside those of the training; None if it does not, or there was none."""
        low, high = float(self.low), float(self.high)
        if not value < low and not value > high:  # NaN: nothing was seen
            return None
        return (
            f"return {value:g} lies outside the {low:g} to {high:g} seen in training: the head extrapolates"
        )

    def forward(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """``gamma`` and ``beta``.

        Shape:
            returns ``(n,)`` or ``()``, NaN where unknown; returns twice ``(K, n, F)``, float32.
        """
        returns = returns.reshape(-1)
        unknown = returns.isnan()
        u = ((returns.float() - self.mean) / self.std).asinh().masked_fill(unknown, 0.0)
        waves = [wave(f * u) / f for f in FREQUENCIES for wave in (torch.sin, torch.cos)]
        phi = torch.stack([u, *waves], dim=-1).masked_fill(unknown.unsqueeze(1), 0.0)
        gamma, beta = (RETURN_GAIN * phi @ self.gain).chunk(2, dim=-1)
        return gamma, beta


def as_return(value: float | Tensor) -> Tensor:
    """A return a person asks for, checked: one number ``()``, or one a row ``(B,)`` with NaN where it is unknown.

    Raises:
        TeaError: for an infinite number, a NaN that stands alone, or another shape.
    """
    asked = torch.as_tensor(value, dtype=torch.float32).detach()
    if asked.dim() > 1 or bool(asked.isinf().any()) or (asked.dim() == 0 and bool(asked.isnan())):
        found = f"{asked.item():g}" if asked.dim() == 0 else f"shape {tuple(asked.shape)}, inf or NaN"
        raise TeaError(
            f"a desired return is one finite number, or one for each row of the batch, got {found}; "
            "leave it out (None) where it is unknown"
        )
    return asked


def returns_of_positions(returns: Tensor, positions: torch.Size) -> Tensor:
    """One return for all, as it is; one a row, spread over the positions of the batch.

    Shape:
        returns ``()``, or the first axes of ``positions``; returns ``()`` or ``(number of positions,)``.

    Raises:
        TeaError: if the returns are of another batch.
    """
    if returns.dim() == 0:
        return returns
    if returns.shape != positions[: returns.dim()]:
        raise TeaError(
            f"{tuple(returns.shape)} returns are asked for, but the batch is {tuple(positions)}; "
            "ask for one number, or for one a row"
        )
    missing = len(positions) - returns.dim()
    return returns.reshape(returns.shape + (1,) * missing).expand(positions).reshape(-1)


def shared_work(state_ids: Tensor, returns: Tensor | None) -> Tensor:
    """Numbers that are equal where both the state and the return asked for in it are, ``(N,)``.

    Generations that have not parted share a state but need not end alike.

    Raises:
        TeaError: if there are neither one nor ``N`` returns.
    """
    if returns is None or returns.dim() == 0:
        return state_ids
    returns = returns_of_positions(returns, state_ids.shape)
    known = returns.masked_fill(returns.isnan(), torch.inf)  # no two NaN are equal
    distinct, number = torch.unique(known, return_inverse=True)
    return state_ids * len(distinct) + number
