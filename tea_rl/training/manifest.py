"""What a run was made with, and whether a resumed run is still the same one."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

import tea_rl
from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import Recipe

_PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
    "gymnasium",
    "datasets",
)
#: Settings that may differ on resume: none of them changes what a step computes (``train.num_threads`` only in the last
#: bits; nor does ``train.max_steps``, under a schedule that does not look ahead).
_FREE_ON_RESUME = {
    ("description",),
    ("train", "eval_steps"),
    ("train", "save_steps"),
    ("train", "save_total_limit"),
    ("train", "report_to"),
    ("train", "num_threads"),
}


@dataclass
class BaseModelFacts:
    """What a run remembers of its base model, loaded or only known from a state store.

    Attributes:
        base_model: its name.
        base_model_source: where it was loaded from.
        base_model_digest: of the reference weight.
        dtype, device: number format of the states, and where the head is trained.
    """

    base_model: str
    base_model_source: str
    base_model_digest: str
    dtype: str
    device: str

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> BaseModelFacts:
        """Those of a loaded backbone."""
        dtype = str(backbone.dtype).removeprefix("torch.")
        return cls(backbone.name_or_path, backbone.source, backbone.digest, dtype, str(backbone.device))


def build_manifest(recipe: Recipe, base: BaseModelFacts, head: TeaHead, digest: str) -> dict[str, Any]:
    """Versions, seeds and digests of a run, as JSON values."""
    return {
        "tea_rl_version": tea_rl.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "num_threads": torch.get_num_threads(),
        "seed": recipe.train.seed,
        **asdict(base),
        "data_digest": digest,
        "trainable_parameters": sum(parameter.numel() for parameter in head.trainable_parameters()),
    }


def check_same_run(path: Path, recipe: Recipe, base: BaseModelFacts, digest: str) -> None:
    """Refuse to resume with another recipe, model or data than the run began with.

    Raises:
        TeaError: naming what differs.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        before = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # killed before its first line was written: nothing to contradict
    except (ValueError, yaml.YAMLError) as error:
        raise TeaError(
            f"cannot resume {path}: its manifest.json or recipe.yaml is damaged ({str(error).splitlines()[0]}); start a new run"
        ) from error
    now = yaml.safe_load(recipe.to_yaml())
    free = set(_FREE_ON_RESUME)
    if recipe.train.lr_scheduler_type.startswith("constant"):
        free.add(("train", "max_steps"))
    changed = [key for key in _differences(before, now) if key not in free]
    if changed:
        names = ", ".join(".".join(key) for key in changed)
        raise TeaError(
            f"cannot resume {path}: the recipe differs from the run's in {names}; set it back or start a new run"
        )
    for name, came in (
        ("base_model_digest", base.base_model_digest),
        ("data_digest", digest),
        ("dtype", base.dtype),
    ):
        if manifest.get(name) != came:
            raise TeaError(
                f"cannot resume {path}: {name} was {str(manifest.get(name))[:16]} when the run began and is {came[:16]} now; "
                "restore the same model and data, or start a new run"
            )


def _differences(before: Any, now: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [
            key
            for name in names
            for key in _differences(before.get(name), now.get(name), (*prefix, str(name)))
        ]
    return [] if before == now else [prefix]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
