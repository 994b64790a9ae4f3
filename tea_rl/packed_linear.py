"""Weights laid out once the way a CPU's bfloat16 products read them, instead of anew at every call.

torch multiplies bfloat16 through oneDNN, which rearranges the weight of a plain ``nn.Linear`` at every product: a fixed cost a
step, a third of the time where few rows are multiplied. The operators that hold a rearranged weight are those that
`torch.compile` makes its CPU code of.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from tea_rl.devices import cpu_has_bfloat16
from tea_rl.errors import TeaError
from tea_rl.probe import Sample
from tea_rl.quantization import replace_layers

_FOR_INFERENCE = "this backbone's weights are laid out for inference"


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` for inference: ``(..., in)`` to ``(..., out)``. The plain weight is gone.

    Attributes:
        weight_sample: what is still known of the plain weight.

    Raises:
        TeaError: in `forward`, if a gradient is wanted; in `state_dict`, always: a model saved without its weights would be lost.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # Neither parameter nor buffer: nothing but the product can read it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.weight_sample = Sample.of(layer.weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise TeaError(
                f"{_FOR_INFERENCE} and have no gradients: load it with load_backbone(..., plain=True)"
            )
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise TeaError(f"{_FOR_INFERENCE} and cannot be saved: load it with load_backbone(..., plain=True)")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def packed_weights(body: nn.Module) -> dict[str, Sample]:
    """What is known of the weights that `pack_linear_layers` took away, by the names that they had."""
    return {
        f"{name}.weight": module.weight_sample
        for name, module in body.named_modules()
        if isinstance(module, PackedLinear)
    }


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has such products of a number format, and is faster with them."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return known and dtype == torch.bfloat16 and cpu_has_bfloat16()


def pack_linear_layers(body: nn.Module) -> None:
    """Replace the linear layers of a frozen transformer, in place; layers of other classes and shared weights stay."""
    holders = Counter(id(p) for module in body.modules() for p in module.parameters(recurse=False))

    def packed(layer: nn.Module) -> nn.Module | None:
        return PackedLinear(layer) if type(layer) is nn.Linear and holders[id(layer.weight)] == 1 else None

    replace_layers(body, packed)  # one after the other: at no time are there two of all
