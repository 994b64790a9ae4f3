"""Tokens at which a completion could have gone another way."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forking_tokens(entropy: Tensor, share: float) -> Tensor:
    """Places of the tokens where the policy was least sure, in order: ``objective.top_entropy_quantile``.

    Most tokens follow from those before them, and an update has little to change there (Wang et al. 2025, "Beyond the 80/20 Rule",
    arXiv:2506.01939, section 5). What is left out costs nothing here, for an update needs no other token of the completion.

    Args:
        entropy: of the policy that wrote them, ``(N,)`` in nats.
        share: of the tokens to keep, rounded up; at least one is.

    Returns:
        ``(K,)`` int64.
    """
    count = min(len(entropy), max(1, math.ceil(share * len(entropy))))
    # Stable: which of equally sure tokens stay is the same everywhere.
    return torch.argsort(entropy, descending=True, stable=True)[:count].sort().values
