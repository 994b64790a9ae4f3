"""Rollouts of earlier steps, to learn from once more: their recorded probabilities say how far the policy has moved since."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tea_rl.rollout.trajectory import TokenBatch

_FILE_NAME = "replay.safetensors"
_ADVANTAGES = "advantages"


class Replay:
    """Tokens and advantages of the latest steps.

    Args:
        steps: how many of them are kept; 0 keeps none.

    Attributes:
        batches: tokens and the advantage of each, ``(N,)``, oldest first.
    """

    def __init__(self, steps: int) -> None:
        self.batches: deque[tuple[TokenBatch, Tensor]] = deque(maxlen=steps)

    def add(self, tokens: TokenBatch, advantages: Tensor) -> None:
        """Keep a step's tokens, and let go of the oldest ones."""
        self.batches.append((tokens, advantages))

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint's folder; nothing where there are none."""
        tensors = {
            f"{number}.{name}": value
            for number, (tokens, advantages) in enumerate(self.batches)
            for name, value in (tokens.tensors() | {_ADVANTAGES: advantages.contiguous()}).items()
        }
        if tensors:
            save_file(tensors, folder / _FILE_NAME)

    def load(self, folder: Path, device: torch.device) -> None:
        """Restore what `save` wrote."""
        self.batches.clear()
        if not (folder / _FILE_NAME).is_file():
            return
        parts: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / _FILE_NAME, device=str(device)).items():
            number, name = key.split(".", 1)
            parts.setdefault(int(number), {})[name] = value
        for _, part in sorted(parts.items()):
            self.add(TokenBatch.from_tensors(part), part[_ADVANTAGES])
