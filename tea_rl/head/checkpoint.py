"""A saved TEA head: ``tea_config.json``, ``tea_head.safetensors`` and a README; no pickle anywhere."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tea_rl
from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead

CONFIG_NAME = "tea_config.json"
WEIGHTS_NAME = "tea_head.safetensors"


def save_pretrained(head: TeaHead, folder: str | Path) -> None:
    """Write a head into ``folder`` (made if missing). The reference weight is not part of it, only its digest.

    Raises:
        TeaError: if the head holds a number that is not finite; nothing is written then.
    """
    if not head.is_finite():
        raise TeaError(
            "the head holds numbers that are not finite and was not saved; resume from the last checkpoint"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tea_rl_version": tea_rl.__version__,
        "base_model_name_or_path": head.base_model_name_or_path,
        "reference_digest": head.reference_digest,
        "base_model_settings": head.base_settings,
        "hidden_size": head.hidden_size,
        "vocab_size": head.vocab_size,
        "logit_scale": head.logit_scale,
        "strength": head.strength,
        "head": head.config.model_dump(),
    }
    asked = head.asked_return
    if head.config.return_conditioning:
        # Of returns for the rows of a batch none is worth keeping.
        config["asked_return"] = asked.item() if asked is not None and asked.dim() == 0 else None
    else:
        del config["head"]["return_conditioning"]
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: value.contiguous() for name, value in head.head_state().items()}, folder / WEIGHTS_NAME)
    (folder / "README.md").write_text(_model_card(config), encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """``tea_config.json`` of a saved head.

    Raises:
        TeaError: if the folder holds no readable head.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = f"; did you mean {folder / 'head'}?" if (folder / "head" / CONFIG_NAME).is_file() else ""
        what = "there is no such folder" if not folder.exists() else f"it has no {CONFIG_NAME}"
        raise TeaError(
            f"expected a saved TEA head in {folder}, but {what}{hint or '; train one with `tea-rl train`'}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        HeadConfig(**config["head"])
        config["strength"] = float(config.get("strength", 1.0))
        asked = config.get("asked_return")
        config["asked_return"] = None if asked is None else float(asked)
        config["base_model_settings"] = dict(config.get("base_model_settings") or {})
        for name, kind in (("reference_digest", str), ("hidden_size", int), ("vocab_size", int)):
            if not isinstance(config[name], kind):
                raise ValueError(f"{name} is {config[name]!r}: the head was saved without a backbone")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise TeaError(
            f"{path} is not a valid head configuration ({first}); take another copy of the head"
        ) from error
    return config


def from_pretrained(folder: str | Path, backbone: Backbone) -> TeaHead:
    """Load a saved head for the backbone it was trained on.

    Raises:
        TeaError: if the head is missing or damaged, or belongs to another base model.
    """
    config = read_config(folder)
    if (config["hidden_size"], config["vocab_size"]) != (backbone.hidden_size, backbone.vocab_size):
        raise TeaError(
            f"the head in {folder} fits a model with hidden size {config['hidden_size']} and {config['vocab_size']} tokens, "
            f"but {backbone.name_or_path} has {backbone.hidden_size} and {backbone.vocab_size}; "
            f"load {config.get('base_model_name_or_path')}"
        )
    if config["reference_digest"] != backbone.digest:
        raise TeaError(
            f"the head in {folder} was trained on {config.get('base_model_name_or_path')} with reference digest "
            f"{config['reference_digest'][:12]}, but the loaded {backbone.name_or_path} has {backbone.digest[:12]}; "
            "load the same weights"
        )
    head = TeaHead.for_backbone(backbone, HeadConfig(**config["head"]))
    load_weights(head, Path(folder) / WEIGHTS_NAME)
    head.strength = config["strength"]
    head.set_return(config["asked_return"])
    return head.eval()


def load_weights(head: TeaHead, path: Path) -> None:
    """Fill a head of the same configuration from ``tea_head.safetensors``.

    Raises:
        TeaError: if the file is missing, damaged or of another shape.
    """
    try:
        tensors = load_file(path)
        # Random widths and feature subsets are drawn, so their packed shapes come from the file.
        _adopt_layout(head, tensors)
        missing, unexpected = head.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name not in ("weight", "bias")]
        if missing or unexpected:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise TeaError(f"{path} is not a readable TEA head ({first}); take another copy of it") from error


def _adopt_layout(head: TeaHead, tensors: dict[str, Any]) -> None:
    if not head.config.random_widths:
        return
    for name, parameter in head.named_parameters():
        if name.startswith("members.") and name in tensors:
            parameter.data = parameter.data.new_zeros(tensors[name].shape)


def push_to_hub(head: TeaHead, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a head to the Hugging Face Hub and return the address of the commit.

    Raises:
        TeaError: if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(head, folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(
                api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload TEA head")
            )
        except Exception as error:  # no network, no login, a bad name: each layer below has errors of its own
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TeaError(
                f"the Hub did not take the head as {repo_id} ({first}); check the name, the login and the network"
            ) from error


def _model_card(config: dict[str, Any]) -> str:
    base, head = config["base_model_name_or_path"], config["head"]
    steering = ""
    if head.get("return_conditioning"):
        steering = "\nhead.set_return(1.0)  # the return to aim at, in units of the training rewards"
    return f"""---
base_model: {base}
library_name: tea-rl
tags: [tea-rl, reinforcement-learning]
---

# TEA head for {base}

A Tail Embedding Adapter: {head["num_members"]} residual networks ({head["member_kind"]}, readout {head["readout"]}) of widths
{head["hidden_sizes"]} over the final hidden states, added to the frozen `lm_head`. It works only with the base model whose output weight has the digest
`{config["reference_digest"]}`.

```python
from tea_rl import load_backbone, TeaHead

backbone = load_backbone("{base}")
head = TeaHead.from_pretrained("path/to/this/folder", backbone){steering}
backbone.install(head)
```
"""
