"""Where a model is looked for, and what each mistake is answered with."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from tea_rl import model_source, packaged
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models"))


def error_line(*args, **kwargs) -> str:
    """The text of the TeaError that load_backbone raises; it must be one line."""
    with pytest.raises(TeaError) as caught:
        load_backbone(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path, llama):
    assert "no model folder at" in error_line(str(tmp_path / "nowhere"))
    assert 'Did you mean "llama"?' in error_line(str(llama.parent / "lama"))


def test_folder_that_is_no_model(tmp_path):
    assert "has no config.json" in error_line(str(tmp_path))
    (tmp_path / "tea_config.json").write_text("{}")
    assert "holds a TEA head, not a model" in error_line(str(tmp_path))


def test_file_that_is_no_model(tmp_path):
    file = tmp_path / "model.bin"
    file.write_text("x")
    assert "expected a model folder, a .gguf file or a Hub id" in error_line(str(file))


def test_gguf_that_is_missing_or_not_one(tmp_path):
    assert "no GGUF file at" in error_line(str(tmp_path / "a.gguf"))
    (tmp_path / "model.gguf").write_text("nonsense")
    assert 'Did you mean "model.gguf"?' in error_line(str(tmp_path / "modle.gguf"))
    assert "is not a GGUF file" in error_line(str(tmp_path / "model.gguf"))
    assert "pass the file itself" in error_line(str(tmp_path))


def test_missing_tokenizer(tmp_path):
    assert "no usable tokenizer" in error_line(str(save_tiny("llama", tmp_path, tokenizer=False)))


def test_missing_broken_or_partial_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny("llama_untied", tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lacks 1 weights of LlamaForCausalLM (first: lm_head.weight)" in error_line(str(folder))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load the weights" in error_line(str(folder))
    weights.unlink()
    assert "cannot load the weights" in error_line(str(folder))
    (folder / "config.json").write_text("{")
    assert "cannot read the configuration" in error_line(str(folder))


def test_weights_are_never_unpickled(tmp_path):
    folder = save_tiny("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "only safetensors weights are read" in error_line(str(folder))


def test_unknown_settings(llama):
    folder = str(llama)
    assert 'Did you mean "bfloat16"?' in error_line(folder, dtype="bfloat")
    assert 'Did you mean "nf4"?' in error_line(folder, quantization="nf")
    assert 'Did you mean "cuda"?' in error_line(folder, device="cuda0")


def test_missing_device_and_package(llama, monkeypatch):
    folder = str(llama)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none" in error_line(folder, device="cuda")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    assert "`pip install bitsandbytes`" in error_line(folder, quantization="nf4")


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Pretend to be online; returns a setter for what the Hub answers."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)

    def answer(reply):
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *args, **kwargs: reply())

    return answer


def raising(error: Exception):
    def reply():
        raise error

    return reply


def test_unreachable_hub_is_one_line(hub):
    hub(raising(ConnectionError("no route\nto host")))
    text = error_line("someone/some-model")
    assert "cannot be reached (no route)" in text and "local folder" in text


def test_silent_hub_is_given_up_soon(hub, monkeypatch):
    monkeypatch.setattr(model_source, "HUB_SECONDS", 0.2)
    hub(lambda: time.sleep(3))
    start = time.monotonic()
    assert "did not answer" in error_line("someone/some-model")
    assert time.monotonic() - start < 2


def test_offline_is_named():
    assert "HF_HUB_OFFLINE is set" in error_line("someone/some-model")


def test_default_model_without_hub_or_package(monkeypatch):
    monkeypatch.setattr(model_source, "packaged_gguf", lambda: None)
    monkeypatch.setattr(model_source, "_ask_hub", lambda *args: "the Hub is away")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    assert packaged.INSTALL_COMMAND in error_line(packaged.DEFAULT_MODEL)
    monkeypatch.setattr(model_source, "packaged_gguf", lambda: Path("x.gguf"))
    assert "at revision v1" in error_line(
        packaged.DEFAULT_MODEL, revision="v1"
    )  # the package has no revisions


def test_unknown_model_and_revision(hub):
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    # Built without __init__, which wants a response of whichever HTTP library the client uses.
    hub(raising(RepositoryNotFoundError.__new__(RepositoryNotFoundError)))
    assert "no model of that name" in error_line("someone/some-model")
    hub(raising(RevisionNotFoundError.__new__(RevisionNotFoundError)))
    assert "has no revision v9" in error_line("someone/some-model", revision="v9")


def test_reachable_and_cached_hub(hub, monkeypatch):
    hub(lambda: None)
    source = model_source.find_model("someone/some-model", "v1")
    assert (source.path, source.revision, source.local_only) == ("someone/some-model", "v1", False)
    assert source.arguments()["trust_remote_code"] is False
    hub(raising(ConnectionError("away")))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: "/cache/config.json"
    )
    assert model_source.find_model("someone/some-model").arguments()["local_files_only"] is True
