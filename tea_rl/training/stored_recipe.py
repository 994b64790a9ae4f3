"""A recipe and the store it learns from: what both say must agree, and what the recipe leaves out the store knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tea_rl.data.encode import RENDERING_SETTINGS
from tea_rl.errors import TeaError
from tea_rl.recipe import Recipe
from tea_rl.states.keys import differing_keys, recipe_keys
from tea_rl.states.store import StateStore
from tea_rl.training.progress import Listener

#: Settings that a recipe which learns from a store may leave out.
OPTIONAL_SETTINGS = (("model", "name_or_path"), *(("data", name) for name in RENDERING_SETTINGS))


def fit_recipe(recipe: Recipe, store: StateStore, listener: Listener) -> Recipe:
    """The recipe of a run from a store, completed with what the store was made with.

    Model, format, template, system and longest row decided what the states are. A recipe that names one of them must name
    what the store was made with; one that leaves it out gets the store's, so that the run's ``recipe.yaml`` tells the truth.
    Temperature, context, quantization, a dtype other than auto and a shortlist size in numbers must agree, named or not.

    Raises:
        TeaError: naming everything that differs, with both values.
    """
    made = _made_with(store)
    there: dict[str, Any] = dict(store.keys)
    here: dict[str, Any] = recipe_keys(recipe)
    fitted = recipe.model_copy(deep=True)
    taken = []
    for (group, name), value in made.items():
        settings = getattr(fitted, group)
        own = getattr(settings, name)
        if name in settings.model_fields_set and not _same(name, own, value):
            there[f"{group}.{name}"], here[f"{group}.{name}"] = value, own
        elif own != value:
            taken.append(f"{group}.{name} {value!r}")
        if name not in settings.model_fields_set:
            setattr(settings, name, value)
    found = differing_keys(there, here)
    if found:
        raise TeaError(
            f"the store {store.path} does not fit the recipe: {found}; set the recipe to the store's values, or make another "
            "store with tea-rl embed or tea-rl rollout"
        )
    if taken:
        listener.on_note(f"as the store was made with: {', '.join(taken)}")
    return fitted


def _made_with(store: StateStore) -> dict[tuple[str, str], Any]:
    """Optional settings as the store remembers them."""
    rendering = store.keys.get("rendering_digest")
    rendering = rendering if isinstance(rendering, dict) else {}
    made = {("data", name): rendering[name] for name in RENDERING_SETTINGS if name in rendering}
    return {("model", "name_or_path"): store.keys["base_model_name_or_path"], **made}


def _same(name: str, own: Any, value: Any) -> bool:
    if own == value:
        return True
    if name != "name_or_path":
        return False
    paths = Path(own), Path(value)
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
