"""A text space that holds any string."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from gymnasium import spaces

_SAMPLED = string.ascii_letters + string.digits + string.punctuation + " "
_SAMPLED_LENGTH = 20


class AnyText(spaces.Text):
    """Every ``str``: empty, long, in any alphabet.

    ``gymnasium.spaces.Text`` lists its characters one by one: its default refuses spaces and the empty text, and a list
    of all of Unicode takes seconds to build. Here membership is a type check; only :meth:`sample` keeps to a few
    characters. Vectorise environments with ``vectorization_mode="sync"``: shared memory would cut long texts.

    >>> "Grüße, 世界\\n" in AnyText() and "" in AnyText()
    True
    >>> 7 in AnyText()
    False
    """

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(_SAMPLED_LENGTH, min_length=0, charset=_SAMPLED, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is text."""
        return isinstance(x, str)

    @property
    def is_np_flattenable(self) -> bool:
        """No: a text of any length and alphabet has no array of fixed size."""
        return False

    def __repr__(self) -> str:
        return "AnyText()"

    def __eq__(self, other: object, /) -> bool:
        return isinstance(other, AnyText)
