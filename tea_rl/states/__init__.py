"""State store: what the backbone computed for every token, kept on disk so that it never has to run again."""

from tea_rl.states.keys import check_keys, recipe_keys, store_keys
from tea_rl.states.store import StateStore
from tea_rl.states.writer import StoredRow, StoreHeader, StoreWriter

__all__ = [
    "StateStore",
    "StoreHeader",
    "StoreWriter",
    "StoredRow",
    "check_keys",
    "recipe_keys",
    "store_keys",
]
