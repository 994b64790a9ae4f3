"""tea-rl: fine-tune a language model with rewards by training only its tail."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: Public names and the modules that hold them. Loaded on first use, so that the command line answers at once.
_EXPORTS = {
    "Backbone": "tea_rl.backbone",
    "load_backbone": "tea_rl.backbone",
    "TeaError": "tea_rl.errors",
    "HeadConfig": "tea_rl.head.config",
    "TeaHead": "tea_rl.head.layer",
    "Recipe": "tea_rl.recipe",
    "load_recipe": "tea_rl.recipe",
    "DecodeSettings": "tea_rl.rollout.decode",
    "generate": "tea_rl.rollout.decode",
    "train": "tea_rl.training.online",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
