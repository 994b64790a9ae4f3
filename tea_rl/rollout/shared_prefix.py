"""Attention to prompts that many completions share: their keys and values are held, and read, once for all of them.

A batch of completions has few prompts. Kept a row each, the keys and values of a long prompt are read once for every completion at
every step, which is nearly all that such a step does. Here a prompt's completions ask its keys together, in one product; what each
has written itself is asked apart, and the two answers are put together by their masses (Juravsky et al. 2024, "Hydragen", section
3.1):

    out = (Z_prompt out_prompt + Z_own out_own) / (Z_prompt + Z_own),    Z = sum_j exp(q . k_j)

A model hands a layer of the cache its new keys and values, gets all of them back, and gives these to its attention function. Ours
(`tea_rl.attention.grouped_attention`) asks the layer that they came from instead.

Shape letters: ``P`` prompts of up to ``L`` tokens, ``B`` rows, ``M`` rows of the prompt that has most, ``H`` query heads, ``G``
key-value heads, ``W`` their width, ``S`` own tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tea_rl.attention import NAME, OWNER, UnservedAttention, kernel_is_fast
from tea_rl.backbone import Backbone
from tea_rl.rollout.probe_step import ProbeStep, close_to

#: Prompts shorter than this, or with fewer rows each, are cheaper to copy (measured, see benchmarks/LOG.md).
_LONG, _MANY = 48, 3


class Readers:
    """Which prompt each row goes on from; one object for all layers.

    Args:
        mask: 0 on padding, ``(P, L)``.

    Attributes:
        bias: what is added to the scores of prompts, ``(P, 1, 1, L)`` float32; None where no prompt is padded.
        most: ``M``.
    """

    def __init__(self, mask: Tensor) -> None:
        self._seen, lowest = mask != 0, torch.finfo(torch.float32).min
        self.bias: Tensor | None = None
        if not bool(self._seen.all()):
            hidden = ~self._seen[:, None, None]
            self.bias = torch.zeros(hidden.shape, device=mask.device).masked_fill_(hidden, lowest)
        self._prompts = len(mask)
        self._checked: Tensor | None = None
        self._follow(torch.arange(len(mask), device=mask.device))

    def select(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``, in that order and with repeats."""
        self._follow(self._prompt[indices])

    def _follow(self, prompt: Tensor) -> None:
        self._prompt = prompt
        rows = torch.arange(len(prompt), device=prompt.device)
        counts = torch.bincount(prompt, minlength=self._prompts)
        self.most = int(counts.max())
        order = torch.argsort(prompt, stable=True)
        number = torch.empty_like(order)
        number[order] = rows - (counts.cumsum(0) - counts)[prompt[order]]
        self._place = prompt * self.most + number
        # Prompts with fewer rows than others are filled up with any of them.
        self._row = torch.zeros(self._prompts * self.most, dtype=torch.long, device=prompt.device)
        self._row[self._place] = rows
        self._regular = torch.equal(self._row, rows)

    def check(self, mask: Tensor | None) -> None:
        """See that a model's mask hides padding and nothing else; once for all layers, which are given the same one.

        Raises:
            UnservedAttention: if it does not.

        Shape:
            mask ``(B, 1, 1, L + S)``, True or 0 where a token may be seen; None: all are.
        """
        if mask is None:
            if self.bias is not None:
                raise UnservedAttention("no mask where prompts are padded")
            return
        if mask is self._checked:
            return
        prompt = self._seen[self._prompt]
        length, seen = prompt.shape[1], mask if mask.dtype == torch.bool else mask == 0
        if mask.shape[1:3] != (1, 1) or mask.shape[3] < length:
            raise UnservedAttention("a mask of another shape")
        if not (torch.equal(seen[:, 0, 0, :length], prompt) and bool(seen[..., length:].all())):
            raise UnservedAttention("a mask that hides more than padding")
        self._checked = mask

    def by_prompt(self, rows: Tensor) -> Tensor:
        """``(B, ...)`` to ``(P, M, ...)``."""
        placed = rows if self._regular else rows[self._row]
        return placed.unflatten(0, (self._prompts, self.most))

    def by_row(self, placed: Tensor) -> Tensor:
        """``(P, M, ...)`` to ``(B, ...)``."""
        rows = placed.flatten(0, 1)
        return rows if self._regular else rows[self._place]


class SharedPrefixLayer(DynamicLayer):
    """One layer's keys and values of prompts, held once, and room for what each row appends, one token at a time.

    Where torch's kernel is slow they are kept in float32: what is shared takes little room, and is not converted at every step.

    Args:
        prompts: the prefilled layer.
        room: tokens that a row may append.
        readers: which rows read which prompt.

    Attributes:
        asked: how often attention was worked out here.
    """

    def __init__(self, prompts: DynamicLayer, room: int, readers: Readers) -> None:
        super().__init__()
        self.asked = 0
        keys, values = prompts.keys, prompts.values
        self.lazy_initialization(keys, values)
        self._readers, self._own = readers, 0
        if not kernel_is_fast(keys.dtype):  # products read the keys column by column
            keys, values = keys.float().transpose(2, 3).contiguous().transpose(2, 3), values.float()
        self._prompt_keys, self._prompt_values = keys, values
        self._keys, self._values = (
            part.new_empty(*part.shape[:2], room, part.shape[3]) for part in (keys, values)
        )

    def get_seq_length(self) -> int:
        """Tokens of a row, its prompt and padding included."""
        return self._prompt_keys.shape[-2] + self._own

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Append a token to each row; what is returned is for `attend` alone."""
        self._keys[:, :, self._own] = key_states[:, :, 0]
        self._values[:, :, self._own] = value_states[:, :, 0]
        self._own += 1
        setattr(key_states, OWNER, self)
        return key_states, value_states

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``; the readers are told apart, once for all layers."""
        self._keys, self._values = self._keys.index_select(0, indices), self._values.index_select(0, indices)

    def attend(self, query: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention of the newest token of each row to its prompt and its own tokens.

        Raises:
            UnservedAttention: if the mask says something else than is known already.

        Shape:
            query ``(B, H, 1, W)``; mask as in `Readers.check`; returns ``(B, 1, H, W)``.
        """
        self.asked += 1
        self._readers.check(mask)
        rows, heads, _, width = query.shape
        groups, most = self._prompt_keys.shape[1], self._readers.most
        scale = scale or 1 / math.sqrt(width)
        asked = query.reshape(rows, groups, heads // groups, width)

        together = self._readers.by_prompt(asked).transpose(1, 2).flatten(2, 3)  # (P, G, M * H / G, W)
        far = _weighed(together, self._prompt_keys, self._prompt_values, self._readers.bias, scale)
        far = self._readers.by_row(far.unflatten(2, (most, -1)).transpose(1, 2))
        own = slice(0, self._own)
        near = _weighed(asked, self._keys[:, :, own], self._values[:, :, own], None, scale)
        share = torch.sigmoid(far[..., -1:] - near[..., -1:])
        out = torch.lerp(near[..., :-1], far[..., :-1], share)
        return out.to(query.dtype).view(rows, 1, heads, -1)


def _weighed(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Mean of the values under the scores' softmax and, last, the log of their mass, ``(..., T, W + 1)`` float32.

    Shape:
        query ``(..., T, W)``; keys and values ``(..., S, W)``; bias, added to the scores, ``(..., 1, S)`` float32.
    """
    if keys.dtype != torch.float32:
        out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scale
        )
        return torch.cat([out.float(), mass.unsqueeze(-1)], dim=-1)
    scores = (query.float() * scale) @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    mass = scores.logsumexp(dim=-1, keepdim=True)
    return torch.cat([(scores - mass).exp_() @ values, mass], dim=-1)


def worth_sharing(backbone: Backbone, mask: Tensor, rows: int) -> bool:
    """Whether prompts ``(P, L)`` that so many rows go on from are long enough to be shared, and the model lets them be.

    Args:
        backbone: one whose every layer attends to the whole sequence.
        mask: 0 on padding.
        rows: of all prompts.
    """
    prompts, length = mask.shape
    if length < _LONG or rows < _MANY * prompts:
        return False
    if backbone.shares_prefixes is None:
        backbone.shares_prefixes = _divides_attention(backbone)
    return backbone.shares_prefixes


def share_prefix(cache: Cache, mask: Tensor, room: int) -> Readers:
    """Let all rows that go on from a prefilled cache share what it holds, in place.

    Args:
        cache: of full attention layers only.
        mask: 0 on padding, ``(P, L)``.
        room: tokens that each row may append.

    Returns:
        what has to be told of every choice of rows.
    """
    readers = Readers(mask)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        cache.layers[index] = SharedPrefixLayer(layer, room, readers)
    return readers


@torch.no_grad()
def _divides_attention(backbone: Backbone) -> bool:
    """Whether a token's states are the same if its attention is divided: nothing but `grouped_attention` may touch the keys."""
    config = backbone.model.config.get_text_config()
    if backbone.device.type != "cpu" or config._attn_implementation != NAME:
        return False
    plain = ProbeStep(backbone, 2, 5).run(lambda _: None)
    probe = ProbeStep(backbone, 2, 5)
    try:
        divided = probe.run(lambda cache: share_prefix(cache, probe.mask[:, :-1], room=1))
    except Exception:  # a model that reads or reshapes its keys, or leaves a layer empty, may fail in any way
        return False
    asked_once = all(
        isinstance(layer, SharedPrefixLayer) and layer.asked == 1 for layer in probe.cache.layers
    )
    return asked_once and close_to(backbone)(divided, plain)
