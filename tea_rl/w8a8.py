r"""8-bit weights and 8-bit inputs (W8A8) for a backbone on a CPU: integer products, about three times as fast as float32.

A product is :math:`y = s_x\,(q_x q_w^\top) \odot s_w` with :math:`q_x = \mathrm{round}(x / (c\,s_x))` and
:math:`q_w = \mathrm{round}(c\,w / s_w)`, both int8, summed exactly in int32 by `torch._int_mm`. Every row of inputs has its own
step :math:`s_x` and every row of weights its own :math:`s_w`, so a token's state depends on that token's past and on nothing
else in the batch. :math:`c` moves large input channels into the weights (SmoothQuant, arXiv:2211.10438, equation 4); which
strength serves a layer best is found on a short text when the model is loaded.

The output layer is one of them (`W8A8Output`). Its weight and the final states are rounded once and for all, so that any product of
the two says the same, integer or not: heads, stores and losses need not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tea_rl.errors import TeaError
from tea_rl.head.scratch import Scratch
from tea_rl.probe import find_output_layer, output_weight, weight_digest
from tea_rl.quantization import replace_layers
from tea_rl.shared_input import OneProduct, inputs_by_layer, with_same_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Strengths of smoothing that a layer may choose from; 0 leaves its inputs as they are.
STRENGTHS = (0.0, 0.25, 0.5, 0.75)
#: Smallest step, and smallest number that is divided by.
_TINY = 1e-9
#: What the layers are measured on: prose, a list, code, sums. Never longer than this many tokens.
_MAX_TOKENS = 256
#: Tokens that the output layer is measured on.
_OUTPUT_ROWS = 64
_TEXT = """The ferry left the island shortly after seven, carrying three cyclists, a crate of lemons and a dog that belonged to
nobody. "You should have come last year," said the captain, "when the harbour still had a light." I liked the evening, though the
film we saw afterwards was slow, badly acted and far too long; my sister thought it was wonderful.

Question: 17 - 29 =
Answer: -12

- Water boils at 100 degrees Celsius at sea level.
- In 1969 the population was about 3.6 billion (United Nations, 2019).

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)
"""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 and their steps.

    Shape:
        x: ``(N, K)``, floating point; returns ``(N, K)`` int8 and ``(N, 1)`` in the dtype of ``x``. A row of zeros stays one.
    """
    steps = x.abs().amax(dim=1, keepdim=True).mul_(1 / 127).clamp_(min=_TINY)
    return x.div(steps).round_().to(torch.int8), steps


class Int8Group(nn.Module):
    """Linear layers that read the same input, as one integer product.

    Args:
        weights: their weights, each ``(out, K)``.
        smoothing: inputs are divided by it, ``(K,)``, weights multiplied; None for none.

    Attributes:
        sizes: outputs of each layer.
    """

    weight: Tensor
    steps: Tensor
    inverse_smoothing: Tensor

    def __init__(self, weights: list[Tensor], smoothing: Tensor | None) -> None:
        super().__init__()
        weight = torch.cat(weights).float()
        if smoothing is None:  # a tensor all the same: what is compiled then fits every layer
            smoothing = torch.ones(weight.shape[1])
        quantised, steps = quantise_rows(weight * smoothing)
        self.register_buffer("weight", quantised)
        self.register_buffer("steps", steps.squeeze(1))
        self.register_buffer("inverse_smoothing", 1 / smoothing)
        self.sizes = [len(part) for part in weights]
        self._shared = OneProduct(self.sizes)

    def product(self, x: Tensor, start: int, end: int) -> Tensor:
        """Outputs ``start`` to ``end`` of ``x``: ``(..., K)`` to ``(..., end - start)``, in the dtype of ``x``."""
        return self.exact_product(x, start, end).to(x.dtype)

    def exact_product(self, x: Tensor, start: int, end: int, scratch: Scratch | None = None) -> Tensor:
        """`product` in float32 whatever the dtype of ``x``; with ``scratch`` in there."""
        quantised, steps = self._quantise(x)
        weight = self.weight[start:end].t()
        if scratch is None:
            sums = torch._int_mm(quantised, weight).float()
        else:
            shape = (len(quantised), end - start)
            whole = torch._int_mm(quantised, weight, out=scratch.take("sums", shape, torch.int32, x.device))
            sums = scratch.take("logits", shape, torch.float32, x.device).copy_(whole)
        return sums.mul_(self.steps[start:end]).mul_(steps).view(*x.shape[:-1], end - start)

    def rounded_weight(self) -> Tensor:
        """The weight that `product` multiplies with, ``(out, K)`` float32."""
        return self.weight * self.steps.unsqueeze(1) * self.inverse_smoothing

    def rounded_input(self, x: Tensor) -> Tensor:
        """What `product` multiplies ``x`` as, in its shape and dtype; rounding it again changes nothing."""
        quantised, steps = self._quantise(x)
        return (quantised * steps).div_(self.inverse_smoothing).to(x.dtype).view(x.shape)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_rows(x.reshape(-1, x.shape[-1]).float() * self.inverse_smoothing)

    def outputs(self, x: Tensor, number: int) -> Tensor:
        """What layer ``number`` makes of ``x``, worked out once for all layers while they are given the same tensor."""
        return self._shared.part(x, number, lambda rows: self.product(rows, 0, len(self.weight)))


class W8A8Linear(nn.Module):
    """One linear layer of an `Int8Group`: ``(..., K)`` to ``(..., out)``."""

    bias: Tensor | None

    def __init__(self, group: Int8Group, number: int, bias: Tensor | None) -> None:
        super().__init__()
        self.group, self._number = group, number
        self.out_features, self.in_features = group.sizes[number], group.weight.shape[1]
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.group.outputs(x, self._number)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class W8A8Output(nn.Module):
    """An output layer as an integer product: ``(..., D)`` to ``(..., V)``, float32 whatever the dtype of the states.

    Args:
        group: of it alone.
        bias: of the dense layer.
        like: weight of the dense layer.

    Attributes:
        weight: the rounded weight, ``(V, D)`` in the dtype of the dense one.
        dense_digest: `tea_rl.probe.weight_digest` of the dense one.
    """

    bias: Tensor | None

    def __init__(self, group: Int8Group, bias: Tensor | None, like: Tensor) -> None:
        super().__init__()
        self.group, self.dense_digest = group, weight_digest(like)
        self.weight = nn.Parameter(group.rounded_weight().to(like.dtype), requires_grad=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)

    def logits(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """`forward`; with ``scratch`` the logits are put in there."""
        logits = self.group.exact_product(x, 0, len(self.weight), scratch)
        return logits if self.bias is None else logits.add_(self.bias)


@torch.no_grad()
def use_w8a8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Replace every linear layer of a causal LM by integer products, in place.

    Layers that the model does not ask on an ordinary text (and layers of other classes) stay as they are.

    Args:
        model: with a transformer ``base_model``.
        tokenizer: its tokenizer.
        max_length: tokens in its context.

    Raises:
        TeaError: the transformer has no linear layer.
    """
    body = model.base_model
    ids = tokenizer(_TEXT, return_tensors="pt").input_ids[:, : min(_MAX_TOKENS, max_length)]
    with inputs_by_layer(body) as inputs:
        body(input_ids=ids, use_cache=False)
    if not inputs:
        raise TeaError(
            f"model.quantization w8a8 replaces nn.Linear layers, but {type(body).__name__} has none: use none or another model"
        )
    replaced: dict[nn.Module, W8A8Linear] = {}
    for layers in with_same_input(inputs):
        weights = [layer.weight.detach() for layer in layers]
        rows = inputs[layers[0]].reshape(-1, weights[0].shape[1]).float()
        group = best_group(weights, rows)
        for number, layer in enumerate(layers):
            replaced[layer] = W8A8Linear(group, number, None if layer.bias is None else layer.bias.detach())
    replace_layers(body, replaced.get)
    _replace_output(model, ids)


def _replace_output(model: PreTrainedModel, ids: Tensor) -> None:
    parent, attribute, layer = find_output_layer(model)
    weight, bias = output_weight(layer).detach(), getattr(layer, "bias", None)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    # A wide output on many rows takes as long as all other layers; few tell as much.
    group = best_group([weight], states[:: max(1, len(states) // _OUTPUT_ROWS)].float())
    setattr(parent, attribute, W8A8Output(group, None if bias is None else bias.detach(), weight))

    def round_states(body: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
        output.last_hidden_state = group.rounded_input(output.last_hidden_state)
        return output

    model.base_model.register_forward_hook(round_states)


def best_group(weights: list[Tensor], rows: Tensor) -> Int8Group:
    """The group whose outputs for ``rows``, ``(N, K)``, come closest to the dense ones, of all `STRENGTHS`."""
    weight = torch.cat(weights).float()
    dense = functional.linear(rows, weight)
    size = dense.norm(dim=1).clamp(min=_TINY)
    # A row has a step of its own, so what counts is how large a channel is within its row.
    profile = rows.div(rows.abs().amax(dim=1, keepdim=True).clamp(min=_TINY)).abs().amax(dim=0)
    best: tuple[float, Int8Group] | None = None
    for strength in STRENGTHS:
        group = Int8Group(weights, _smoothing(profile, weight, strength))
        error = float(((group.product(rows, 0, len(weight)) - dense).norm(dim=1) / size).mean())
        if best is None or error < best[0]:
            best = error, group
    assert best is not None
    return best[1]


def _smoothing(profile: Tensor, weight: Tensor, strength: float) -> Tensor | None:
    if strength == 0:
        return None
    largest = weight.abs().amax(dim=0)
    return profile.clamp(min=1e-5) ** strength / largest.clamp(min=1e-5) ** (1 - strength)
