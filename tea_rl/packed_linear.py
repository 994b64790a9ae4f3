"""Weights laid out once the way a CPU's bfloat16 products read them, instead of anew at every call.

torch multiplies bfloat16 through oneDNN, which rearranges the weight of a plain ``nn.Linear`` at every product: a fixed cost a
step, a third of the time where few rows are multiplied. The operators that hold a rearranged weight are those that
`torch.compile` makes its CPU code of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tea_rl.devices import cpu_has_bfloat16
from tea_rl.errors import TeaError
from tea_rl.head.scratch import Scratch
from tea_rl.probe import Sample, find_output_layer
from tea_rl.quantization import replace_layers
from tea_rl.shared_input import OneProduct, inputs_by_layer, with_same_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows whose logits are there in half precision at once.
_ROWS = 256
_FOR_INFERENCE = "this backbone's weights are laid out for inference"


class PackedGroup:
    """The weights of linear layers that read the same input, as one, laid out: ``(..., in)`` to ``(..., sum of out)``.

    Args:
        layers: all of them with a bias, or none.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        # Neither parameter nor buffer: nothing but the product can read it.
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._shared = OneProduct([layer.out_features for layer in layers])

    def outputs(self, x: Tensor, number: int) -> Tensor:
        """What layer ``number`` makes of ``x``."""
        return self._shared.part(x, number, self._product)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedGroup:
        return self  # never changed, and torch cannot copy it

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "none", [], "")


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` for inference: ``(..., in)`` to ``(..., out)``. The plain weight is gone.

    Args:
        layer: the plain one.
        group: where its weight is, with others' that read the same input.
        number: of the layer in the group.

    Attributes:
        weight_sample: what is still known of the plain weight.

    Raises:
        TeaError: in `forward`, if a gradient is wanted; in `state_dict`, always: a model saved without its weights would be lost.
    """

    def __init__(self, layer: nn.Linear, group: PackedGroup, number: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._group, self._number = group, number
        self.weight_sample = Sample.of(layer.weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise TeaError(
                f"{_FOR_INFERENCE} and have no gradients: load it with load_backbone(..., plain=True)"
            )
        return self._group.outputs(x, self._number)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise TeaError(f"{_FOR_INFERENCE} and cannot be saved: load it with load_backbone(..., plain=True)")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class PackedOutput(nn.Module):
    """An output layer whose weight is kept twice: laid out for products, and plain for the embedding and for heads, which read rows.

    The logits are the plain layer's, bit for bit. Once the plain weight is changed, moved or put in another number format it alone is
    used (what is written through ``weight.data`` cannot be seen).

    Attributes:
        weight: the plain layer's own, ``(V, D)``.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self._packed_from = self._state()

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), -1 if self.weight.is_inference() else self.weight._version

    def forward(self, x: Tensor) -> Tensor:
        if (x.requires_grad and torch.is_grad_enabled()) or self._packed_from != self._state():
            return functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")

    def logits(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """`forward` in float32, ``(..., D)`` to ``(..., V)``; with ``scratch`` ``(N, D)`` to ``(N, V)``, in there."""
        rows = x.reshape(-1, x.shape[-1])
        shape = (len(rows), self.out_features)
        out = (
            x.new_empty(shape, dtype=torch.float32)
            if scratch is None
            else scratch.take("logits", shape, torch.float32, x.device)
        )
        # Never are all of them held in half precision as well.
        for start in range(0, len(rows), _ROWS):
            out[start : start + _ROWS] = self(rows[start : start + _ROWS])
        return out.view(*x.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedOutput:
        return self  # frozen, and torch cannot copy what is laid out


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


def pack_output_layer(model: PreTrainedModel) -> None:
    """Replace the output layer of a causal LM, in place, unless it is of another class than ``nn.Linear``."""
    parent, attribute, layer = find_output_layer(model)
    if type(layer) is nn.Linear:
        setattr(parent, attribute, PackedOutput(layer))


@torch.no_grad()
def pack_linear_layers(body: nn.Module, input_ids: Tensor) -> None:
    """Replace the linear layers of a frozen transformer, in place; layers of other classes and shared weights stay.

    Args:
        body: the transformer.
        input_ids: any tokens ``(1, T)``; shows which layers read the same input.
    """
    holders = Counter(id(p) for module in body.modules() for p in module.parameters(recurse=False))
    with inputs_by_layer(body) as inputs:
        body(input_ids=input_ids, use_cache=False)
    together = {layer: layers for layers in with_same_input(inputs) for layer in layers}
    del inputs
    replaced: dict[nn.Module, PackedLinear] = {}

    def packed(layer: nn.Module) -> nn.Module | None:
        if type(layer) is not nn.Linear or holders[id(layer.weight)] > 1:
            return None
        if layer not in replaced:
            # Unasked on these tokens (an expert, say), or unlike the others: alone.
            like = [
                other
                for other in together.pop(layer, [layer])
                if holders[id(other.weight)] == 1 and (other.bias is None) == (layer.bias is None)
            ]
            group = PackedGroup(like)
            for number, other in enumerate(like):
                together.pop(other, None)
                replaced[other] = PackedLinear(other, group, number)
        return replaced.pop(layer)

    replace_layers(body, packed)  # one group after the other: at no time are there two of all
