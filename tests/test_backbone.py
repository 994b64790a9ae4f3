"""Loading, freezing and beheading a model; models that are refused; invariants of install and uninstall."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tea_rl import devices, packaged
from tea_rl.backbone import load_backbone
from tea_rl.devices import resolve_dtype
from tea_rl.errors import TeaError
from tea_rl.model_source import quiet_transformers
from tea_rl.probe import probe_output
from tea_rl.quantization import Int8Linear, avoid_odd_packing, quiet_bitsandbytes
from tests.tiny import CONTEXT, SUPPORTED, VOCAB_SIZE, save_tiny, tiny_backbone, tiny_model, tiny_tokenizer

TEXTS = ["Hello, world", "A much longer prompt than the first"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One saved tiny model a family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root) for family in (*SUPPORTED, "gemma2", "mamba", "bert", "t5")}


@pytest.fixture
def llama(folders):
    return load_backbone(str(folders["llama"]), dtype="float32", device="cpu")


class Wrapper(nn.Module):
    """The smallest head: the reference plus a bonus on one token."""

    def __init__(self, reference: nn.Module, token: int = 0, bonus: float = 0.0) -> None:
        super().__init__()
        self.reference, self.token, self.bonus = reference, token, bonus

    @property
    def weight(self) -> torch.Tensor:
        return self.reference.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.reference(hidden).clone()
        logits[..., self.token] += self.bonus
        return logits


# ---- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED)
def test_family_states_reproduce_the_logits(folders, family):
    backbone = load_backbone(str(folders[family]), dtype="float32", device="cpu")
    ids = backbone.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    states = backbone.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])
    assert states.shape == (*ids.shape, backbone.hidden_size)
    assert backbone.logit_scale == SUPPORTED[family]
    expected = backbone.model(ids).logits
    torch.testing.assert_close(backbone.logit_scale * backbone.reference(states), expected)


@pytest.mark.parametrize("family", SUPPORTED)
def test_family_left_padding_and_cache_change_nothing(folders, family):
    """Batched with padding, then token by token through the cache: the states of the plain forward pass."""
    from transformers import DynamicCache

    backbone = load_backbone(str(folders[family]), dtype="float32", device="cpu")
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    assert mask[0, 0] == 0 and mask[0, -1] == 1  # padded on the left
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=backbone.model.config)
    head = backbone.forward(ids[:, :-1], mask[:, :-1], positions[:, :-1], cache)
    last = backbone.forward(ids[:, -1:], mask, positions[:, -1:], cache)
    states = torch.cat([head, last], 1)
    for row, text in enumerate(TEXTS):
        alone = backbone.forward(backbone.tokenizer(text, return_tensors="pt").input_ids)[0]
        torch.testing.assert_close(states[row, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_fields(llama, folders):
    assert (llama.hidden_size, llama.vocab_size, llama.max_length) == (32, VOCAB_SIZE, CONTEXT)
    assert (llama.eos_token_ids, llama.pad_token_id) == ((1,), 0)
    assert llama.device.type == "cpu" and llama.dtype == torch.float32
    assert llama.name_or_path == str(folders["llama"]) and str(folders["llama"]) in llama.source
    assert llama.body is llama.model.model and llama.reference is llama.model.lm_head
    assert llama.tokenizer.padding_side == "left"
    assert not llama.installed


def test_everything_is_frozen_and_in_eval_mode(llama):
    assert not any(p.requires_grad for p in llama.model.parameters())
    assert not any(m.training for m in llama.model.modules())
    assert not llama.forward(torch.tensor([[5, 6]])).requires_grad


def test_several_eos_ids_and_a_tokenizer_without_pad(tmp_path):
    folder = save_tiny("llama", tmp_path, eos_token_id=[7, 9])
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    backbone = load_backbone(str(folder))
    assert backbone.eos_token_ids == (7, 9, 1)
    assert backbone.tokenizer.pad_token_id == backbone.pad_token_id
    assert backbone.model.generation_config.pad_token_id == backbone.pad_token_id


def test_digest_is_equal_across_load_dtypes(tmp_path):
    folder = str(
        save_tiny("llama", tmp_path, dtype=torch.bfloat16, spread=0.01)
    )  # many numbers tiny in float16
    digests = {
        dtype: load_backbone(folder, dtype=dtype).digest for dtype in ("float32", "bfloat16", "float16")
    }
    assert len(set(digests.values())) == 1
    assert len(digests["float32"]) == 64


def test_digest_tells_models_apart(tmp_path, llama):
    assert tiny_backbone(tmp_path, seed=1).digest != llama.digest


def test_load_leaves_the_global_state_alone(folders, capfd, recwarn):
    from transformers.utils import logging as transformers_logging

    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    load_backbone(str(folders["gpt2"]))
    after = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    assert after == before
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_quiet_restores_after_an_error():
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    before = (transformers_logging.get_verbosity(), are_progress_bars_disabled(), sys.stderr)
    with pytest.raises(KeyError), quiet_transformers(drop_stderr=True):
        raise KeyError
    assert (transformers_logging.get_verbosity(), are_progress_bars_disabled(), sys.stderr) == before


@pytest.mark.parametrize("capable, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_on_cpu_follows_the_instructions(monkeypatch, capable, expected):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: capable)
    assert resolve_dtype("auto", torch.device("cpu")) is expected
    assert resolve_dtype("float16", torch.device("cpu")) is torch.float16


@pytest.mark.parametrize(
    "dtype, capable, expected",
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, True, torch.float32),
    ],
)
def test_products_of_a_head_follow_the_backbone(monkeypatch, dtype, capable, expected):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: capable)
    assert devices.product_dtype(torch.zeros(2, 2, dtype=dtype)) is expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family, layer", [("llama", "layers.0.mlp.up_proj"), ("gpt2", "h.0.mlp.c_fc")])
def test_quantised_on_cpu(folders, quantization, family, layer, caplog):
    dense = load_backbone(str(folders[family]), "float32", "none", "cpu")
    backbone = load_backbone(str(folders[family]), "float32", quantization, "cpu")
    assert backbone.body.get_submodule(layer).weight.dtype in (torch.int8, torch.uint8)
    assert backbone.reference.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in backbone.model.parameters())
    ids = backbone.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with caplog.at_level(logging.WARNING):
        states = backbone.forward(ids)
    assert not caplog.records
    difference = (states - dense.forward(ids)).norm() / states.norm()
    assert 0 < difference < {"int8": 0.02, "nf4": 0.2}[quantization]
    # A state depends on its own row's past only, or no recorded state could be recomputed.
    other = torch.cat([ids, ids.flip(1)])
    torch.testing.assert_close(backbone.forward(other)[:1, :-1], states[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.forward(ids[:, :4]), states[:, :4], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_layers_that_bitsandbytes_cannot_repack_are_left_alone():
    quiet_bitsandbytes()
    from bitsandbytes.nn import LinearNF4

    model = torch.nn.Sequential(*(LinearNF4(*shape) for shape in ((32, 64), (64, 48), (64, 32)))).to("cpu")
    for layer in model:
        layer.support_avx512bf16_for_cpu = True  # as on a CPU with bfloat16 instructions
    avoid_odd_packing(model)
    assert [layer.support_avx512bf16_for_cpu for layer in model] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_layer_is_the_product_with_the_unpacked_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (6, 512), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(6, generator=generator) * 0.1, torch.randn(6, generator=generator)
    x = torch.full((2, 3, 512), 20.0)  # 512 x 20 x 127 is beyond float16
    result = Int8Linear(weight, scale, bias)(x.to(dtype))
    assert result.dtype == dtype
    expected = x @ (weight.float() * scale[:, None] / 127).T + bias
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(result.float(), expected, **tolerance)


# ---- install and uninstall ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED)
def test_generate_goes_through_an_installed_head(folders, family):
    backbone = load_backbone(str(folders[family]), dtype="float32", device="cpu")
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    plain = backbone.model.generate(**batch, **settings)
    backbone.install(Wrapper(backbone.reference))
    assert backbone.installed
    assert torch.equal(backbone.model.generate(**batch, **settings), plain)
    backbone.install(Wrapper(backbone.reference, token=77, bonus=1e6))
    assert (backbone.model.generate(**batch, **settings)[:, -6:] == 77).all()
    backbone.uninstall()
    assert torch.equal(backbone.model.generate(**batch, **settings), plain)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt_neox"])
def test_uninstall_restores_the_original_object_and_touches_nothing(folders, family):
    backbone = load_backbone(str(folders[family]), dtype="float32", device="cpu")
    original, embedding = backbone.model.get_output_embeddings(), backbone.model.get_input_embeddings()
    weights = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    shared = embedding.weight is original.weight
    assert shared == (family == "llama")
    head = Wrapper(original, token=3, bonus=1.0)
    backbone.install(head)
    assert backbone.model.get_output_embeddings() is head
    assert backbone.reference is original
    assert backbone.model.get_input_embeddings() is embedding
    backbone.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    backbone.uninstall()
    backbone.uninstall()  # twice is once
    assert not backbone.installed
    assert backbone.model.get_output_embeddings() is original
    assert (embedding.weight is original.weight) == shared
    after = dict(backbone.model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_reference_and_digest_stay_while_a_head_is_installed(folders):
    backbone = load_backbone(str(folders["llama"]))
    ids = torch.tensor([[5, 6, 7]])
    states = backbone.forward(ids)
    expected = load_backbone(str(folders["llama"])).digest
    backbone.install(nn.Linear(32, VOCAB_SIZE))
    assert backbone.digest == expected
    assert torch.equal(backbone.forward(ids), states)


# ---- models that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, reason",
    [
        ("gemma2", "soft-caps its logits at 30"),
        ("mamba", "no key-value cache"),
        ("bert", "encoder-only"),
        ("t5", "encoder-decoder model t5"),
    ],
)
def test_unsuitable_family_is_refused(folders, family, reason):
    with pytest.raises(TeaError, match=reason) as caught:
        load_backbone(str(folders[family]))
    assert "\n" not in str(caught.value)


def test_probe_sees_a_soft_cap_that_no_configuration_states():
    model = tiny_model("gemma2")
    with pytest.raises(TeaError, match="does more to its logits"):
        probe_output(model, tiny_tokenizer(), "it")


def test_probe_sees_an_encoder(monkeypatch):
    """A transformer that reads backwards as well: each state also gets the mean over the whole text."""
    model = tiny_model("llama")
    plain = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: plain(x + x.mean(1, keepdim=True)))
    with pytest.raises(TeaError, match="earlier states depend on later tokens"):
        probe_output(model, tiny_tokenizer(), "it")


def test_probe_sees_a_state_changed_on_its_way_and_puts_the_layer_back(monkeypatch):
    model = tiny_model("llama")
    original, plain = model.lm_head, model.forward

    def shifted(**kwargs):
        hook = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
        try:
            return plain(**kwargs)
        finally:
            hook.remove()

    # The hook runs before the layer's forward, so the layer sees what the body did not return.
    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(TeaError, match="changes the final state"):
        probe_output(model, tiny_tokenizer(), "it")
    assert model.lm_head is original


def test_states_that_overflow_are_reported():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TeaError, match="NaN or infinite hidden states in float32"):
        probe_output(model, tiny_tokenizer(), "it")


# ---- the real model -------------------------------------------------------------------------------------------------

needs_real_model = pytest.mark.skipif(
    packaged.packaged_gguf() is None,
    reason=f"the packaged model is not installed: {packaged.INSTALL_COMMAND}",
)


@pytest.mark.model
@needs_real_model
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_default_model_stays_small_in_memory():
    """Peak resident memory of a fresh process that loads the model and runs it, in MB."""
    packaged.packaged_model()  # the one-off conversion is not what is measured
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from tea_rl.backbone import load_backbone\n"
        f"b = load_backbone('{packaged.DEFAULT_MODEL}', dtype='float32', device='cpu')\n"
        "b.reference(b.forward(torch.ones(1, 8, dtype=torch.long))); b.digest\n"
        # VmHWM, not ru_maxrss: the latter also counts the parent's memory at the moment of the fork.
        "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert int(done.stdout) < 1200


@pytest.mark.model
@needs_real_model
@pytest.mark.parametrize(
    "dtype, quantization", [("float32", "none"), ("float32", "nf4"), ("float32", "int8")]
)
def test_default_model_answers(dtype, quantization):
    backbone = load_backbone(packaged.DEFAULT_MODEL, dtype, quantization, "cpu")
    assert (backbone.hidden_size, backbone.vocab_size, backbone.logit_scale) == (576, 49152, 1.0)
    assert backbone.eos_token_ids == (2,) and backbone.max_length == 8192
    prompt = backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = backbone.model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert "Paris" in backbone.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
