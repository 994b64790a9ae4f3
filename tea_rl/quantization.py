"""8- and 4-bit weights for a backbone: through bitsandbytes (``int8``, ``nf4``), or with 8-bit inputs (`tea_rl.w8a8`).

Whichever it is, a token's state depends on that token's past and on nothing else in the batch, so a state that was
recorded can be computed again.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tea_rl.errors import TeaError, did_you_mean

QUANTIZATIONS = ("none", "int8", "nf4", "w8a8")
#: Outputs that bitsandbytes packs together on a CPU.
_PACKED_OUTPUTS = 32


def check_quantization(quantization: str, device: torch.device) -> None:
    """Refuse an unknown kind, a missing package, or a device bitsandbytes does not serve.

    Raises:
        TeaError: any of the three.
    """
    if quantization not in QUANTIZATIONS:
        known, hint = ", ".join(QUANTIZATIONS), did_you_mean(quantization, QUANTIZATIONS)
        raise TeaError(f'model.quantization must be one of {known}, got "{quantization}".{hint}')
    if quantization == "w8a8" and device.type != "cpu":
        raise TeaError(
            f"model.quantization w8a8 is for device cpu, got {device.type}: use int8 or nf4, or set model.device to cpu"
        )
    if quantization in ("none", "w8a8"):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TeaError(
            f"model.quantization is {quantization}, but bitsandbytes is not installed: "
            "`pip install bitsandbytes`, or set model.quantization to none"
        )
    if device.type == "mps":
        raise TeaError(f"model.quantization {quantization} is not supported on mps: use none, or device cpu")


def quantization_config(quantization: str, dtype: torch.dtype) -> Any | None:
    """What ``from_pretrained`` is told for ``int8`` or ``nf4``; None for what it loads dense."""
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def quiet_bitsandbytes() -> None:
    """Before its first import: it warns on some CPUs that an optional package, which nobody asked for, is missing."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Int8Linear(nn.Module):
    r"""A linear layer with int8 weights and floating-point inputs: ``y = x @ (weight * scale).T + bias``.

    bitsandbytes' own int8 product also quantises the inputs and picks its outlier columns over the whole batch, so a
    state moves by percents with the rows and the later tokens beside it. Without outlier columns it is local, but
    visibly worse. Keeping the inputs as they are is local and closer to the dense model than either.

    Shape:
        weight: ``(out, in)`` int8; scale: ``(out,)`` float32, the largest absolute weight of a row;
        input ``(..., in)``, output ``(..., out)`` in the input's dtype.
    """

    # Inputs are divided by this power of two, exactly, so that sums over weights up to 127 fit float16.
    INPUT_DIVISOR = 128

    weight: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        # scale / 127 is one step of a row (bitsandbytes' convention); times what inputs were divided by.
        self.register_buffer("step", scale.float() * (self.INPUT_DIVISOR / 127))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        product = functional.linear(x / self.INPUT_DIVISOR, self.weight.to(x.dtype)) * self.step.to(x.dtype)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def use_weight_only_int8(model: nn.Module) -> None:
    """Replace every freshly loaded bitsandbytes int8 layer of ``model`` by an `Int8Linear` that shares its weights."""
    from bitsandbytes.nn import Linear8bitLt

    def packed(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, Linear8bitLt):
            return None
        bias = None if layer.bias is None else layer.bias.detach()
        return Int8Linear(layer.weight.data, layer.weight.SCB, bias)

    replace_layers(model, packed)


def avoid_odd_packing(model: nn.Module) -> None:
    """Let 4-bit layers whose sizes bitsandbytes cannot repack for CPUs with bfloat16 instructions stay as they are loaded.

    Its faster layout needs whole blocks of inputs and outputs in multiples of 32; asked for it with others, it fails.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit) and layer.weight.quant_state is not None:
            whole = layer.in_features % layer.weight.quant_state.blocksize == 0
            if not whole or layer.out_features % _PACKED_OUTPUTS:
                layer.support_avx512bf16_for_cpu = False


def replace_layers(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put ``replacement(layer)`` in the place of every layer of ``model`` for which it is not None."""
    # Layers themselves are not listed: one that is replaced is to be gone at once.
    for parent in [module for module in model.modules() if any(True for _ in module.children())]:
        for name, child in list(parent.named_children()):
            other = replacement(child)
            if other is not None:
                setattr(parent, name, other)
