"""Where a recipe comes from: shipped or a file, and what its relative paths mean."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from tea_rl.errors import TeaError, did_you_mean
from tea_rl.recipe_schema import shown
from tea_rl.recipe_yaml import parse_yaml


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    try:
        folder = files(import_module("tea_rl.recipes"))
    except ModuleNotFoundError:
        raise TeaError(
            "the shipped recipes are not installed (no package tea_rl.recipes); run `pip install -e .` in the "
            "repository, or give the path of a YAML file."
        ) from None
    with as_file(folder) as path:
        return {file.stem: file for file in sorted(Path(path).glob("*.yaml"))}


def find_recipe_file(name_or_path: str) -> Path:
    """Find the YAML file meant by a shipped name or a path."""
    path = Path(name_or_path).expanduser()
    path_like = path.suffix.lower() in (".yaml", ".yml") or os.sep in name_or_path or "/" in name_or_path
    if path.is_dir() and path_like:
        inside = "recipe.yaml" if (path / "recipe.yaml").is_file() else "a YAML file"
        raise TeaError(f'expected a recipe file, got the folder "{name_or_path}"; give {inside} in it.')
    if path.is_file() and path_like:
        return path
    shipped = shipped_recipes()
    if path_like:
        nearby = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, nearby)
        if not hint and path.stem in shipped:
            hint = f' The shipped recipe is called "{path.stem}", without path and ending.'
        hint = hint or f" Check the path, or name a shipped recipe: {', '.join(shipped)}."
        raise TeaError(f'recipe file "{name_or_path}" does not exist.{hint}')
    if name_or_path not in shipped:
        if path.is_file():
            return path
        raise TeaError(
            f'no shipped recipe is called "{name_or_path}".{did_you_mean(name_or_path, shipped)} '
            f"Shipped: {', '.join(shipped)}; or give the path of a .yaml file."
        )
    return shipped[name_or_path]


def read_recipe_file(path: Path, source: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TeaError(
            f"{source}: expected UTF-8 text, got other bytes at byte {error.start}; save it as UTF-8."
        ) from None
    except OSError as error:
        raise TeaError(f"{source}: cannot be read: {error.strerror}.") from None
    raw = parse_yaml(text, source)
    if raw is None:
        raise TeaError(f"{source}: expected a recipe, got an empty file; it needs at least data and rewards.")
    if not isinstance(raw, dict):
        raise TeaError(f'{source}: expected a mapping of settings ("key: value" lines), got {shown(raw)}.')
    return raw


def _resolve(value: Any, folder: Path, endings: tuple[str, ...]) -> Any:
    """Make a path absolute if the file exists in ``folder`` or the text can only be a path."""
    if not isinstance(value, str) or not value.strip() or value.startswith("reasoning_gym/"):
        return value
    path = Path(value).expanduser()
    path_like = value.startswith(("./", "../", "~", "/")) or path.suffix.lower() in endings
    try:
        exists = (folder / path).exists()
    except OSError:  # a prompt or a schema as long text is no file name
        return value
    return str((folder / path).resolve()) if path_like or exists else value


def resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Resolve, in place, every setting that may name a file."""
    data, model, rewards = raw.get("data"), raw.get("model"), raw.get("rewards")
    if isinstance(data, dict):
        for key in {"prompts", "eval_prompts", "dataset", "store"} & data.keys():
            data[key] = _resolve(data[key], folder, (".txt", ".jsonl", ".json", ".csv", ".parquet"))
    if isinstance(model, dict) and "name_or_path" in model:
        model["name_or_path"] = _resolve(model["name_or_path"], folder, (".gguf",))
    for reward in rewards if isinstance(rewards, list) else []:
        if not isinstance(reward, dict):
            continue
        name, kwargs = reward.get("name"), reward.get("kwargs")
        if isinstance(name, str) and ":" in name:
            file, _, function = name.rpartition(":")
            reward["name"] = f"{_resolve(file, folder, ('.py',))}:{function}"
        if name == "json_schema" and isinstance(kwargs, dict) and "schema" in kwargs:
            kwargs["schema"] = _resolve(kwargs["schema"], folder, (".json",))
