"""What a store is valid for: one backbone, tokenizer, prompt rendering, number format, temperature and context."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.recipe import Recipe
    from tea_rl.states.store import StateStore

#: Shortlist that a store holds for heads that correct the whole vocabulary and have no size of their own.
DEFAULT_SHORTLIST = 128
#: Tells people where a store came from; equal weights may lie under two names, and digests decide.
_INFORMATIVE = ("base_model_name_or_path",)


def store_keys(recipe: Recipe, backbone: Backbone) -> dict[str, Any]:
    """Everything that states, shortlists and log-probabilities depend on, as JSON values."""
    from tea_rl.data.encode import rendering_digest, tokenizer_digest

    return {
        "base_model_name_or_path": backbone.name_or_path,
        "reference_digest": backbone.digest,
        "body_digest": body_digest(backbone),
        "tokenizer_digest": tokenizer_digest(backbone.tokenizer),
        "rendering_digest": rendering_digest(recipe.data, backbone.tokenizer),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "quantization": backbone.quantization,
        "temperature": recipe.rollout.temperature,
        "context": recipe.head.context.model_dump(),
        "shortlist_size": stored_shortlist_size(recipe, backbone.vocab_size),
    }


def recipe_keys(recipe: Recipe) -> dict[str, Any]:
    """Those keys that a recipe alone decides: what training from a store checks, with no backbone loaded."""
    wanted: dict[str, Any] = {
        "quantization": recipe.model.quantization,
        "temperature": recipe.rollout.temperature,
        "context": recipe.head.context.model_dump(),
    }
    if recipe.model.dtype != "auto":
        wanted["dtype"] = recipe.model.dtype
    if isinstance(recipe.head.shortlist_size, int):  # heads on the whole vocabulary can use any store
        wanted["shortlist_size"] = recipe.head.shortlist_size
    return wanted


def stored_shortlist_size(recipe: Recipe, vocab_size: int) -> int:
    """Shortlist that a store made with this recipe holds.

    Raises:
        TeaError: if the recipe's does not fit the vocabulary.
    """
    size = recipe.head.shortlist_size
    if not isinstance(size, int):
        return min(DEFAULT_SHORTLIST, vocab_size - 1)
    if size >= vocab_size:
        raise TeaError(
            f"head.shortlist_size {size} does not fit a vocabulary of {vocab_size} tokens; take a smaller one"
        )
    return size


def check_keys(store: StateStore, wanted: Mapping[str, Any]) -> None:
    """Refuse a store made with other keys; those not in ``wanted`` are not looked at.

    Raises:
        TeaError: naming every key that differs, with both values.
    """
    found = differing_keys(store.keys, wanted)
    if found:
        raise TeaError(
            f"the store {store.path} does not fit: {found}; set the recipe to the store's values, or make another store "
            "with tea-rl embed or tea-rl rollout"
        )


def differing_keys(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """``"temperature is 1.0 there and 0.7 here, ..."``; empty if nothing differs."""
    return ", ".join(
        f"{name} is {_short(before.get(name))} there and {_short(value)} here"
        for name, value in wanted.items()
        if name not in _INFORMATIVE and before.get(name) != value
    )


def body_digest(backbone: Backbone) -> str:
    """SHA-256 over a few numbers of every backbone tensor.

    The reference weight alone would not tell a model from its fine-tuned sibling whose output layer was left as it was.
    """
    import torch

    from tea_rl.packed_linear import packed_weights
    from tea_rl.probe import Sample

    samples = {name: Sample.of(parameter) for name, parameter in backbone.body.named_parameters()}
    samples |= packed_weights(backbone.body)
    sha = hashlib.sha256()
    for name, (shape, dtype, values) in sorted(samples.items()):
        sha.update(f"{name} {shape} {dtype}".encode())
        sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest is told apart by its beginning
