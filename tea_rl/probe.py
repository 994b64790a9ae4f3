"""Find a causal LM's output layer and prove that the logits come from it alone.

Swapping a module changes the policy as intended only when the model calls that module on the final state and does
nothing to the result but scale it. Architectures differ in this and do not declare it, so it is measured: a probe layer
with a known, wide output takes the layer's place for one forward pass.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The probe's logits span -RANGE .. RANGE: wide enough that a soft cap (30 in Gemma 2) bends them visibly.
RANGE = 60.0
# Largest difference, relative to the largest value, that still counts as rounding.
EXACT, ROUNDED = 1e-4, 2e-2
# bfloat16 numbers below this are not all float16 numbers, see `weight_digest`.
SMALLEST_SHARED = 2.0**-14
DIGEST_ROWS = 4096
# A causal model's earlier states do not move with a later token; quantised ones may move by this share.
CAUSAL = 5e-2
#: Numbers of each tensor of a backbone that enter its digest.
_SAMPLED_VALUES = 64


def find_output_layer(model: PreTrainedModel) -> tuple[nn.Module, str, nn.Module]:
    """Return ``(parent, attribute, layer)`` with ``parent.attribute is layer``, the model's output layer.

    Found by identity, so the attribute's name (``lm_head``, ``embed_out``, ...) does not matter.

    Raises:
        TeaError: there is none, or its weight is not a dense floating-point matrix.
    """
    layer = model.get_output_embeddings()
    kind = type(model).__name__
    if layer is None:
        raise TeaError(
            f"{kind} has no output layer to replace: choose a causal language model with an lm_head"
        )
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise TeaError(
            f"the output layer of {kind} ({type(layer).__name__}) has no dense floating-point weight: "
            "load a checkpoint whose output layer is not quantised"
        )
    for path, module in model.named_modules(remove_duplicate=False):
        if module is layer and path:
            parent, _, attribute = path.rpartition(".")
            return model.get_submodule(parent), attribute, layer
    raise TeaError(f"the output layer of {kind} is not one of its submodules: choose another model")


def output_weight(layer: nn.Module) -> Tensor:
    """The weight ``(V, D)`` of a layer from `find_output_layer`, which made sure that it is a matrix."""
    return cast(Tensor, layer.weight)


def weight_digest(weight: Tensor) -> str:
    """SHA-256 over shape and values of an output weight, as bfloat16.

    Equal however a bfloat16 checkpoint is loaded: float32 holds its numbers exactly, and so does float16 except
    the smallest, which count as zero here. (A float32 checkpoint is rounded twice on its way through float16, so
    that one combination gives another digest.)
    """
    sha = hashlib.sha256(str(tuple(weight.shape)).encode())
    for rows in weight.detach().split(DIGEST_ROWS):
        rounded = rows.to("cpu", torch.bfloat16)
        # masked_fill writes +0.0, so the sign of what was dropped does not matter either.
        rounded = rounded.masked_fill(rounded.abs() < SMALLEST_SHARED, 0.0)
        sha.update(rounded.contiguous().view(torch.int16).numpy().data)
    return sha.hexdigest()


class Sample(NamedTuple):
    """What a digest over many tensors knows of one of them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        """Numbers that stand at equal distances."""
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
        return cls(tuple(tensor.shape), tensor.dtype, some.cpu().clone())


class _ProbeLayer(nn.Module):
    """Stands in for the output layer: remembers its input, returns the same known logits at every position."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = output_weight(layer)  # some models look at its dtype or device
        self.bias = None
        self.logits = torch.linspace(-RANGE, RANGE, self.weight.shape[0], device=self.weight.device)
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return self.logits.expand(*hidden.shape[:-1], -1)


@torch.no_grad()
def probe_output(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> float:
    """Measure the constant between the output layer's result and the model's logits.

    Args:
        model: in eval mode; left as it was found.
        tokenizer: supplies a few harmless token ids.
        what: the model's name for messages.

    Returns:
        The factor, 1.0 for most architectures.

    Raises:
        TeaError: the model is not causal, keeps no key-value cache, produces non-finite states, or makes its logits
            in any other way than ``factor * output_layer(final state)``.
    """
    kind, body = type(model).__name__, model.base_model
    if body is model:
        raise TeaError(
            f"{what} ({kind}) does not separate its transformer from its output layer: choose another model"
        )
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        raise TeaError(
            f"{what} ({kind}) keeps no key-value cache (a recurrent model?), which the decode loop needs: choose another model"
        )
    parent, attribute, layer = find_output_layer(model)
    weight = output_weight(layer)
    ids = _some_tokens(tokenizer, weight.shape[0]).to(weight.device)
    probe = _ProbeLayer(layer)
    setattr(parent, attribute, probe)
    try:
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except Exception as error:
        raise TeaError(
            f"{what} ({kind}) does not run with another output layer in place: {error!r}"
        ) from error
    finally:
        setattr(parent, attribute, layer)
    if probe.seen is None:
        raise TeaError(f"{what} ({kind}) does not call its output layer as a module: choose another model")
    states = probe.seen.float()
    if not bool(torch.isfinite(states).all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise TeaError(
            f"{what} gives NaN or infinite hidden states in {dtype}: set model.dtype to float32 or bfloat16"
        )
    direct = _body_states(body, ids)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % weight.shape[0]
    if _difference(direct[:, :-1], _body_states(body, changed)[:, :-1]) > CAUSAL:
        raise TeaError(
            f"expected a causal language model, but in {what} ({kind}) earlier states depend on later tokens "
            "(an encoder): choose another model"
        )
    if states.shape != direct.shape or _difference(states, direct) > _tolerance(weight):
        raise TeaError(
            f"{what} ({kind}) changes the final state between transformer and output layer: choose another model"
        )
    return _scale(probe.logits, result, _tolerance(weight), model, what)


def _some_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """A short sentence as ids ``(1, T)``, ``4 <= T <= 12``, all inside the vocabulary."""
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", add_special_tokens=False)["input_ids"]
    ids = [i for i in ids if i < vocab_size][:12]
    while len(ids) < 4:
        ids.append((len(ids) * 7 + 5) % vocab_size)
    return torch.tensor([ids])


def _body_states(body: nn.Module, ids: Tensor) -> Tensor:
    """Final states ``(1, T, D)`` in float32."""
    return body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state.float()


def _scale(known: Tensor, result: Tensor, tolerance: float, model: PreTrainedModel, what: str) -> float:
    """The factor ``c`` with ``result == c * known`` at every position."""
    kind = type(model).__name__
    wrong = TeaError(
        f"{what} ({kind}) does more to its logits after the output layer than multiply them by a constant "
        "(a soft cap, a bias, a mask), so a head in that layer's place would not define the policy: choose another model"
    )
    if result.shape[-1:] != known.shape:
        raise wrong
    result = result.double().reshape(-1, known.numel())
    known = known.double()
    factor = float((result @ known).mean() / (known @ known))
    if not factor > 0 or _difference(result, (factor * known).expand_as(result)) > tolerance:
        raise wrong
    # The measured factor carries rounding; take the number the configuration states when it is that one.
    config = model.config.get_text_config()
    stated = [1.0]
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value > 0:
            stated.append(1.0 / value if name == "logits_scaling" else float(value))
    nearest = min(stated, key=lambda s: abs(s - factor))
    return nearest if abs(nearest - factor) <= tolerance * factor else factor


def _tolerance(weight: Tensor) -> float:
    return EXACT if weight.dtype == torch.float32 else ROUNDED


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the largest absolute value."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
