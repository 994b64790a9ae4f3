"""Objectives that learn from preferences: DPO, IPO and KTO.

They read *gains*: by how much a completion has become more likely than under the original model, ``sum over its tokens of
log pi - log pi_0``. The original model's log-probabilities are cached, so a second model is never needed. Signs and
normalisations follow TRL's trainers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def row_sums(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum per-token values within rows.

    Shape:
        values and rows ``(N,)``, rows in ``[0, num_rows)``; returns ``(num_rows,)``.

    >>> row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2).tolist()
    [3.0, 4.0]
    """
    return torch.zeros(num_rows, dtype=values.dtype, device=values.device).index_add(0, rows, values)


def dpo(chosen_gains: Tensor, rejected_gains: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta (gain of chosen - gain of rejected))`` (Rafailov et al. 2023, eq. 7).

    Shape:
        gains ``(P,)``, summed over tokens; returns ``(P,)``.
    """
    return -F.logsigmoid(beta * (chosen_gains - rejected_gains))


def ipo(chosen_gains: Tensor, rejected_gains: Tensor, beta: float) -> Tensor:
    """``(gain of chosen - gain of rejected - 1 / (2 beta))^2`` (Azar et al. 2023, eq. 17).

    Shape:
        gains ``(P,)``, *averaged* over tokens, as TRL does with the authors' consent; returns ``(P,)``.
    """
    return (chosen_gains - rejected_gains - 1.0 / (2.0 * beta)) ** 2


def kto(gains: Tensor, desirable: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Prospect-theoretic loss of single completions (Ethayarajh et al. 2024, eq. 7).

        1 - sigmoid(beta (gain - z))  for a desirable completion,  1 - sigmoid(beta (z - gain))  for another

    Args:
        gains: summed over tokens, ``(R,)``.
        desirable: ``(R,)`` bool.
        reference: ``z``, the distance KL(pi || pi_0) of whole completions, ``()``, not negative; no gradient passes. TRL
            estimates it from mismatched completions; with cached states it is the exact token KL summed along the rows
            of the batch.
        beta: weight of the log-ratio.

    Shape:
        returns ``(R,)``.
    """
    margin = gains - reference.detach()
    return 1.0 - torch.sigmoid(beta * torch.where(desirable, margin, -margin))
