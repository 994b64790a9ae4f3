"""Tiny random models and a tiny tokenizer, built without a network in well under a second.

folder = save_tiny("llama", tmp_path)
backbone = load_backbone(str(folder))
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 320
HIDDEN_SIZE = 32
CONTEXT = 128
PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer(more_tokens: tuple[str, ...] = ()) -> Any:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens (pad, eos, bos), with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [PAD, EOS, BOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *more_tokens]
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=EOS, bos_token=BOS, model_max_length=CONTEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _common(**more: Any) -> dict[str, Any]:
    """Fields most configurations share."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        **more,
    }


def _grouped(**more: Any) -> dict[str, Any]:
    return _common(num_key_value_heads=2, **more)


def _gemma(**more: Any) -> dict[str, Any]:
    return _grouped(head_dim=8, **more)


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    gpt2 = {
        "vocab_size": VOCAB_SIZE,
        "n_positions": CONTEXT,
        "n_embd": HIDDEN_SIZE,
        "n_layer": 2,
        "n_head": 4,
    }
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    opt = _common(
        ffn_dim=64, word_embed_proj_dim=24
    )  # states leave OPT through a projection to another width
    opt.pop("intermediate_size")
    return {
        "llama": lambda: t.LlamaConfig(**_grouped(tie_word_embeddings=True)),
        "llama_untied": lambda: t.LlamaConfig(**_grouped(tie_word_embeddings=False)),
        "qwen2": lambda: t.Qwen2Config(**_grouped(tie_word_embeddings=True)),
        "qwen3": lambda: t.Qwen3Config(**_grouped(head_dim=8, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2Config(**gpt2, **ends),
        "gpt_neox": lambda: t.GPTNeoXConfig(**_common()),
        "opt": lambda: t.OPTConfig(**opt),
        "bloom": lambda: t.BloomConfig(
            vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, n_layer=2, n_head=4, **ends
        ),
        "gemma": lambda: t.GemmaConfig(**_gemma()),
        # One sliding layer with a window shorter than a test's text, one full layer.
        "gemma3": lambda: t.Gemma3TextConfig(
            **_gemma(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
        ),
        "gemma2": lambda: t.Gemma2Config(**_gemma(final_logit_softcapping=30.0)),
        "cohere": lambda: t.CohereConfig(**_grouped(logit_scale=0.0625)),
        "granite": lambda: t.GraniteConfig(**_grouped(logits_scaling=8.0)),
        "mamba": lambda: t.MambaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_hidden_layers=2, state_size=4, **ends
        ),
        "bert": lambda: t.BertConfig(**_common()),
        "t5": lambda: t.T5Config(
            vocab_size=VOCAB_SIZE, d_model=HIDDEN_SIZE, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **ends
        ),
    }


#: Families whose logits are a constant times the output layer's result, and that constant.
SUPPORTED = {
    "llama": 1.0,
    "llama_untied": 1.0,
    "qwen2": 1.0,
    "qwen3": 1.0,
    "gpt2": 1.0,
    "gpt_neox": 1.0,
    "opt": 1.0,
    "bloom": 1.0,
    "gemma": 1.0,
    "gemma3": 1.0,
    "cohere": 0.0625,
    "granite": 0.125,
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny ``family`` model, with fields replaced by ``changes``."""
    config = _configs()[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tiny_model(family: str = "llama", seed: int = 0, spread: float = 10.0, **changes: Any) -> Any:
    """A random model of ``family`` in float32.

    Args:
        family: a key of `SUPPORTED`, or one that is refused: ``gemma2``, ``mamba``, ``bert``, ``t5``.
        seed: of the weights; the global generator is left as it was.
        spread: factor on the output weights, so that logits differ enough for greedy texts to mean something.
        changes: configuration fields to replace.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    auto = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(family, AutoModelForCausalLM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(spread)
    return model.eval()


def save_tiny(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True, **options: Any
) -> Path:
    """Save a tiny model and tokenizer to ``folder/family`` and return that path; ``options`` go to `tiny_model`."""
    from tea_rl.model_source import quiet_transformers

    target = Path(folder) / family
    with quiet_transformers():
        tiny_model(family, **options).to(dtype).save_pretrained(target)
        if tokenizer:
            tiny_tokenizer().save_pretrained(target)
    return target


def save_tiny_gguf(file: Path, seed: int = 0) -> Path:
    """Write a random Llama with the tiny tokenizer as an unquantised GGUF to ``file`` and return it."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer(more_tokens=("th",))
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # 3 = control token
    writer.add_token_merges(["t h"])  # transformers refuses an empty list
    for name, index in (("add_pad_token_id", 0), ("add_eos_token_id", 1), ("add_bos_token_id", 2)):
        getattr(writer, name)(index)
    half = HIDDEN_SIZE // 2
    shapes = {
        "token_embd": (len(tokens), HIDDEN_SIZE),
        "output_norm": (HIDDEN_SIZE,),
        "blk.0.attn_norm": (HIDDEN_SIZE,),
        "blk.0.ffn_norm": (HIDDEN_SIZE,),
        "blk.0.attn_q": (HIDDEN_SIZE, HIDDEN_SIZE),
        "blk.0.attn_k": (half, HIDDEN_SIZE),
        "blk.0.attn_v": (half, HIDDEN_SIZE),
        "blk.0.attn_output": (HIDDEN_SIZE, HIDDEN_SIZE),
        "blk.0.ffn_gate": (64, HIDDEN_SIZE),
        "blk.0.ffn_up": (64, HIDDEN_SIZE),
        "blk.0.ffn_down": (HIDDEN_SIZE, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny_backbone(folder: Path, family: str = "llama", **options: Any) -> Any:
    """A loaded `Backbone` around `save_tiny`, in float32 on the CPU."""
    from tea_rl.backbone import load_backbone

    return load_backbone(str(save_tiny(family, folder, **options)), dtype="float32", device="cpu")


def head_base(backbone, head):
    """The original model behind a head that is installed, for `tea_rl.compare.measure`: the head is taken out and put back."""

    @contextmanager
    def base():
        backbone.uninstall()
        try:
            yield backbone.model
        finally:
            backbone.install(head)

    return base
