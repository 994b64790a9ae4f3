"""A step by one token on made-up prompts: what a model's layers do with a cache is found out by asking them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tea_rl.backbone import Backbone

#: How far states may be apart if they are worked out in another way, as a share of their size: rounding and no more. Of inputs that
#: are rounded to 8 bits, the last bit of half precision decides some.
_EXACT, _HALF, _EIGHT_BITS = 1e-4, 0.05, 0.2


class ProbeStep:
    """Prompts of so many tokens of which all but the last have been read; the first of several is padded by one.

    Args:
        backbone: the frozen model.
        rows: prompts.
        length: tokens of each, the newest and padding included.

    Attributes:
        mask: 0 on padding, ``(rows, length)``.
        cache: of the newest `run`.
    """

    def __init__(self, backbone: Backbone, rows: int, length: int) -> None:
        # Spread over the vocabulary: its first tokens mean nothing in many models, whose states are then all rounding.
        ids = (1000 + 997 * torch.arange(rows * length).view(rows, length)) % backbone.vocab_size
        self.mask = torch.ones_like(ids)
        self.mask[0, 0] = int(rows == 1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=backbone.model.config)
        backbone.forward(ids[:, :-1], self.mask[:, :-1], positions[:, :-1], self.cache)
        self._read, self._forward = list(self.cache.layers), backbone.forward
        self._newest = ids[:, -1:], self.mask, positions[:, -1:]

    def run(self, prepare: Callable[[DynamicCache], object]) -> Tensor:
        """States of the newest tokens, ``(rows, 1, D)``; ``prepare`` puts the layers of the cache that are asked in the place of those read."""
        self.cache.layers = list(self._read)
        prepare(self.cache)
        return self._forward(*self._newest, self.cache)


def close_to(backbone: Backbone) -> Callable[[Tensor, Tensor], bool]:
    """Whether what was worked out in another way is what the modules say, in every row and up to rounding."""
    share = _EXACT if backbone.dtype == torch.float32 else _HALF
    if backbone.quantization != "none":
        share = _EIGHT_BITS if backbone.quantization == "w8a8" else _HALF

    def close(found: Tensor, expected: Tensor) -> bool:
        found, expected = found.float().flatten(1), expected.float().flatten(1)
        return bool(((found - expected).norm(dim=1) <= share * expected.norm(dim=1)).all())

    return close
