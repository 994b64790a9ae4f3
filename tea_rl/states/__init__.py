"""State store: what the backbone computed for every token, kept on disk so that it never has to run again."""

from tea_rl.states.keys import check_keys, recipe_keys, store_keys
from tea_rl.states.manifest import StoreHeader
from tea_rl.states.rows import StoredRow
from tea_rl.states.store import StateStore
from tea_rl.states.writer import StoreWriter

__all__ = [
    "StateStore",
    "StoreHeader",
    "StoreWriter",
    "StoredRow",
    "check_keys",
    "recipe_keys",
    "store_keys",
]
