"""Attention on a CPU that reads the keys and values of grouped heads where they lie.

With a mask, transformers copies them for every head of a group first, because kernels of other devices need that; a CPU's does
not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: The name under which transformers knows it, made of the one that it stands in for.
NAME = "tea_rl_sdpa"
#: Arguments of it that only the original one serves.
_SPECIAL = ("position_bias", "softcap", "cache")


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU whose attention is ``sdpa`` use `grouped_attention` in its place."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers; by the kernel's own grouping where a mask is given and no gradient is wanted.

    Shape:
        query ``(B, H, T, W)``; key and value ``(B, G, S, W)``; attention_mask ``(B, 1 or H, T, S)``; returns ``(B, T, H, W)``.
    """
    special = any(kwargs.get(name) is not None for name in _SPECIAL)
    if attention_mask is None or query.requires_grad or special or key.shape[1] == query.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None
