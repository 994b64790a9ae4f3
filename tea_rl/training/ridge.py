"""Ridge regression from normal equations, for several penalties at the price of one."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_weights(gram: Tensor, moment: Tensor, penalties: Tensor) -> Tensor:
    """Solutions of ``(X'X + penalty I) w = X'y``, one column a penalty.

    Args:
        gram: ``X'X``, ``(F, F)`` float64.
        moment: ``X'y``, ``(F,)`` float64.
        penalties: ``(P,)``.

    Shape:
        returns ``(F, P)`` float64.
    """
    values, vectors = torch.linalg.eigh(gram)
    shrunk = (vectors.T @ moment).unsqueeze(1) / (values.clamp(min=0.0).unsqueeze(1) + penalties + 1e-6)
    return vectors @ shrunk
