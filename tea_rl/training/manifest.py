"""What a run was made with, and whether a resumed run is still the same one."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection
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
from tea_rl.recipe import Recipe, parse_recipe
from tea_rl.training.stored_recipe import OPTIONAL_SETTINGS

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
#: bits, ``rollout.reward_timeout`` only where a call took that long; nor does ``train.max_steps``, under a schedule that does not look ahead), nor which head is kept
#: (``train.eval_steps`` does where the best one is).
_FREE_ON_RESUME = {
    ("description",),
    ("train", "eval_steps"),
    ("train", "save_steps"),
    ("train", "save_total_limit"),
    ("train", "report_to"),
    ("train", "num_threads"),
    ("rollout", "reward_timeout"),
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


def check_same_recipe(path: Path, recipe: Recipe) -> None:
    """Refuse to resume with another recipe than the run began with; reads two small files, so it can come first.

    Settings that the recipe leaves out because it learns from a store are not compared: they come from the store.

    Raises:
        TeaError: naming what differs, with both values.
    """
    before = run_recipe(path)
    if before is None:
        return  # killed before its first line was written: nothing to contradict
    before = _with_defaults(before)
    free = set(_FREE_ON_RESUME)
    # Learning rates and expected gradients that fall would fall otherwise over another number of steps, and the last step
    # generates nothing ahead.
    falls = recipe.objective.expected_gradient > 0 and recipe.objective.expected_gradient_steps is None
    looks_ahead = falls or recipe.rollout.reward_workers > 0
    if recipe.train.lr_scheduler_type.startswith("constant") and not looks_ahead:
        free.add(("train", "max_steps"))
    if recipe.train.metric_for_best_model is not None:
        free.remove(("train", "eval_steps"))
    if recipe.data.store is not None:
        free |= {
            (group, name)
            for group, name in OPTIONAL_SETTINGS
            if name not in getattr(recipe, group).model_fields_set
        }
    now = yaml.safe_load(recipe.to_yaml())
    for settings in (before, now):
        settings.pop("compare", None)  # says nothing of this run
    changed = describe_changes(before, now, free)
    if changed:
        raise TeaError(
            f"cannot resume {path}: the recipe differs from the run's in {changed}; set it back (the run's is in "
            f"{path / 'recipe.yaml'}) or start a new run"
        )


def _with_defaults(before: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe with the settings that have come since it began, at the defaults that leave it as it was."""
    try:
        return dict(yaml.safe_load(parse_recipe(before).to_yaml()))
    except TeaError:  # settings that have gone since: what differs is named
        return before


def run_recipe(path: Path) -> dict[str, Any] | None:
    """The resolved recipe in a run's folder, as plain values; None if there is none.

    Raises:
        TeaError: if it is damaged.
    """
    try:
        found = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no settings in it")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TeaError(
            f"cannot resume {path}: its recipe.yaml is damaged ({str(error).splitlines()[0]}); start a new run"
        ) from error
    return found


def check_same_run(path: Path, recipe: Recipe, base: BaseModelFacts, digest: str) -> None:
    """Refuse to resume with another recipe, model or data than the run began with.

    Raises:
        TeaError: naming what differs.
    """
    check_same_recipe(path, recipe)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return  # killed before it was written
    except ValueError as error:
        raise TeaError(
            f"cannot resume {path}: its manifest.json is damaged ({str(error).splitlines()[0]}); start a new run"
        ) from error
    data = f"the store {recipe.data.store}" if recipe.data.store is not None else "the data"
    for name, came, what in (
        ("base_model_digest", base.base_model_digest, f"the model {base.base_model} is another one"),
        ("data_digest", digest, f"{data} is not what it was"),
        ("dtype", base.dtype, f"the states' dtype was {manifest.get('dtype')} and is {base.dtype}"),
    ):
        if manifest.get(name) != came:
            raise TeaError(
                f"cannot resume {path}: since the run began something has changed: {what} ({name} {str(manifest.get(name))[:12]} "
                f"then, {came[:12]} now); restore it or start a new run"
            )


def describe_changes(before: Any, now: Any, free: Collection[tuple[str, ...]] = ()) -> str:
    """``"train.seed (0 then, 1 now), ..."``: every setting that differs and is not free to; empty if none does."""
    changed = [change for change in _differences(before, now) if change[0] not in free]
    return ", ".join(f"{'.'.join(key)} ({_short(old)} then, {_short(new)} now)" for key, old, new in changed)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _differences(
    before: Any, now: Any, prefix: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [
            key
            for name in names
            for key in _differences(before.get(name), now.get(name), (*prefix, str(name)))
        ]
    return [] if before == now else [(prefix, before, now)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
