"""Memory for numbers as wide as the vocabulary, written anew at every step of a rollout.

Taken from the system at every step, such blocks cost more than the arithmetic on them: each of their pages faults when it is
first written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Blocks of memory by name, each as large as the largest tensor that was asked of it. For one rollout, not for threads."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any numbers; whatever was taken under this name and dtype before is overwritten with it."""
        size, key = math.prod(shape), (name, dtype, device)
        block = self._blocks.get(key)
        if block is None or block.numel() < size:
            self._blocks.pop(key, None)  # both at once would be twice the memory
            block = self._blocks[key] = torch.empty(size, dtype=dtype, device=device)
        return block[:size].view(*shape)
