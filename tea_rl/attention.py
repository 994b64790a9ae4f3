"""Attention on a CPU that reads the keys and values of grouped heads where they lie, and does not wait for a slow kernel.

With a mask, transformers copies them for every head of a group first, because kernels of other devices need that; a CPU's does
not. For one new token a row that kernel is slow, in half precision most of all unless it multiplies in tiles: two batched products
take its place.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tea_rl.devices import cpu_has_tiles
from tea_rl.errors import TeaError
from tea_rl.generated import Generated, generate, numbers_unlike

#: The name under which transformers knows it, made of the one that it stands in for.
NAME = "tea_rl_sdpa"
#: Attribute of a key tensor: the layer of a cache that works attention out by itself (`tea_rl.rollout.shared_prefix`).
OWNER = "_tea_rl_owner"
#: Number formats of `kernel_is_fast`. A plain set: compilers look into what is called at every layer.
_fast_formats: set[torch.dtype] = set()
#: Tokens up to which `compiled_newest_token` has its own code (measured, see benchmarks/LOG.md).
_SHORT = 256
#: Arguments of it that only the original one serves.
_SPECIAL = ("position_bias", "softcap", "cache")


class UnservedAttention(TeaError):
    """The layer of a cache that should work attention out does not know this kind of it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"expected attention to all tokens so far, got {what}: this model's prompts cannot be shared; use "
            "prompts of fewer than 48 tokens, and please report the model"
        )


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU whose attention is ``sdpa`` use `grouped_attention` in its place.

    Models that attend to a selection of tokens keep theirs: some of them ask for the name before they apply it.
    """
    kept = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kept <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return
    if cpu_has_tiles():  # Measured: see benchmarks/LOG.md.
        _fast_formats.add(torch.bfloat16)
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, step_mask)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers, where no gradient is wanted by whatever is fastest.

    Where the cache's layer works it out by itself, it is asked. A token a row: `newest_attention`, unless `kernel_is_fast`. Else the
    kernel's own grouping where heads are grouped and transformers would copy them, or the original.

    Shape:
        query ``(B, H, T, W)``; key and value ``(B, G, S, W)``; attention_mask ``(B, 1 or H, T, S)``; returns ``(B, T, H, W)``.

    Raises:
        UnservedAttention: if the layer that should work it out cannot.
    """
    special = any(kwargs.get(name) is not None for name in _SPECIAL) or kwargs.get("dropout", 0.0) > 0.0
    one, owned = query.shape[2] == 1, getattr(key, OWNER, None) is not None
    if owned and (special or not one):
        raise UnservedAttention("several new tokens a row, or another argument")
    if owned or not (special or query.requires_grad):
        if one:
            return newest_token(query, key, value, attention_mask, kwargs.get("scaling")), None
        if key.shape[1] != query.shape[1] and attention_mask is not None:
            return _kernel(query, key, value, attention_mask, kwargs.get("scaling")), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def step_mask(
    batch_size: int, q_length: int, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask of ``sdpa``; for one new token a row as numbers, which the kernel would else make of it in every layer."""
    mask = sdpa_mask(batch_size, q_length, *args, dtype=dtype, **kwargs)
    if mask is None or q_length != 1 or dtype is None:
        return mask
    # Not minus infinity: padding that is read as a token sees nothing, and must not become NaN.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def newest_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of one new token a row without gradients: by the cache, by torch's kernel, or by `newest_attention`.

    Shape:
        as in `newest_attention`.
    """
    owner = getattr(key, OWNER, None)
    if owner is not None:
        return owner.attend(query, mask, scale)
    slow = query.dtype != torch.float32 or key.shape[1] != query.shape[1]
    if slow and not kernel_is_fast(query.dtype):
        return newest_attention(query, key, value, mask, scale)
    return _kernel(query, key, value, mask, scale)


def compiled_newest_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """`newest_token`, in short rows by code that the compiler wrote: torch's kernel has too little to do there.

    Shape:
        as in `newest_attention`.

    Raises:
        CompilerFailed: there is no C++ compiler, or one that does not do.
    """
    rows, heads, _, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    # The layout of a pre-allocated cache, of which both are parts, is what the code was written for.
    room = key.stride(1)
    laid_out = key.stride() == value.stride() == (groups * room, room, width, 1) and key.shape == value.shape
    if laid_out and slots <= _SHORT and getattr(key, OWNER, None) is None:
        added = query.new_zeros(rows, 1, 1, slots) if mask is None else mask
        scale_used = 1 / math.sqrt(width) if scale is None else scale
        code = _compiled_attention(query.dtype, scale_used, groups, heads // groups, width)
        if code is not None and added.shape == (rows, 1, 1, slots) and added.dtype == query.dtype:
            asked = query.reshape(rows, groups, heads // groups, width).contiguous()
            return code([asked, key, value, added.contiguous()])[0].view(rows, 1, heads, width)
    return newest_token(query, key, value, mask, scale)


@cache
def _compiled_attention(
    dtype: torch.dtype, scale: float, groups: int, heads: int, width: int
) -> Generated | None:
    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor]:
        scores = ((query.float() * scale).unsqueeze(3) * key.float().unsqueeze(2)).sum(-1) + mask.float()
        weights = scores.softmax(-1).unsqueeze(-1)
        return ((weights * value.float().unsqueeze(2)).sum(3).to(dtype),)

    rows, slots, room = islice(numbers_unlike([groups, heads, width]), 3)
    cached = torch.empty(rows, groups, room, width, dtype=dtype)[:, :, :slots]
    query, mask = (
        torch.empty(rows, groups, heads, width, dtype=dtype),
        torch.empty(rows, 1, 1, slots, dtype=dtype),
    )
    return generate(attention, (query, cached, cached, mask), [rows, slots])


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def kernel_is_fast(dtype: torch.dtype) -> bool:
    """Whether torch's kernel serves one new token a row well here, once a model uses `grouped_attention`."""
    return dtype in _fast_formats


def newest_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attention of one new token a row to all tokens of the row, itself included.

    The scores and their softmax are float32 whatever the dtype, as in the kernel; in half precision the weights of the values are
    rounded to it, as there.

    Args:
        mask: True where a token may be seen, or what is added to the scores; None: all are seen.
        scale: of the scores; None: one over the root of the width.

    Shape:
        query ``(B, H, 1, W)``; key and value ``(B, G, S, W)``, ``G`` a divisor of ``H``; mask ``(B, 1 or H, 1, S)``; returns
        ``(B, 1, H, W)``.
    """
    rows, heads, _, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    if rows == 1:  # the kernel has less to call, and enough to do
        out = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.to(query.dtype).transpose(1, 2)
    asked = query.reshape(rows, groups, heads // groups, width).float() * (scale or 1 / math.sqrt(width))
    scores = torch.matmul(asked, key.float().transpose(2, 3)).view(rows, heads, 1, slots)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).to(value.dtype).view(rows, groups, heads // groups, slots)
    return torch.matmul(weights, value).view(rows, 1, heads, value.shape[-1])
