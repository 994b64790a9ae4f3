"""Ridge regression from normal equations, for several penalties at the price of one."""

from __future__ import annotations

import torch
from torch import Tensor

#: Smallest number that is divided by.
_TINY = 1e-12


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


class Ridge:
    """Fits of ``y`` to ``X`` at any penalty, and what they say of rows they have not seen, from one decomposition.

    With ``X = U S V'`` and ``Z = U S``, the fit at penalty ``p`` says ``H y`` with ``H = Z (S^2 + p)^-1 Z'``. Without a group ``g``
    of rows it would say ``y_g - (I - H_gg)^-1 (y - H y)_g`` of them: the leave-one-out formula of linear regression, for blocks.

    Args:
        features: ``X``, ``(N, F)``, float32 or float64, which all is worked out in.
        targets: ``y``, ``(N,)``.
    """

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self._targets = targets
        rows, columns = features.shape
        # By way of the smaller of X'X and XX'.
        if rows > columns:
            values, basis = torch.linalg.eigh(features.T @ features)
            self._values, self._scores, self._basis = values.clamp(min=0.0), features @ basis, basis
        else:
            values, left = torch.linalg.eigh(features @ features.T)
            self._values = values.clamp(min=0.0)
            self._scores = left * self._values.sqrt()
            self._basis = features.T @ (left / self._values.clamp(min=_TINY).sqrt())
        self._moment = self._scores.T @ targets

    def weights(self, penalty: float) -> Tensor:
        """Solution of ``(X'X + penalty I) w = X'y``, ``(F,)``."""
        return self._basis @ (self._moment / (self._values + penalty + _TINY))

    def left_out(self, folds: Tensor, penalties: Tensor) -> Tensor:
        """What every row is said to be by the fit to the other folds.

        Shape:
            folds ``(N,)``; penalties ``(P,)``, positive; returns ``(N, P)``.
        """
        shrink = 1.0 / (self._values.unsqueeze(1) + penalties + _TINY)
        residuals = self._targets.unsqueeze(1) - self._scores @ (self._moment.unsqueeze(1) * shrink)
        said = torch.empty_like(residuals)
        for number in folds.unique():
            own = folds == number
            scores = self._scores[own]
            rest = -(scores * shrink.T.unsqueeze(1)) @ scores.T
            rest.diagonal(dim1=1, dim2=2).add_(1.0)
            errors = torch.linalg.solve(rest, residuals[own].T.unsqueeze(2)).squeeze(2).T
            said[own] = self._targets[own].unsqueeze(1) - errors
        return said
