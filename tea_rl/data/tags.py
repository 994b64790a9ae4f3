"""The reward tags of the original TEA notebooks, written into the text they rate: ``The film was superb. <r2>``.

A tag rates the whole completion, wherever in it it stands, and is taken out. A completion without a tag, in a file where
others have one, counts 1, as in the notebooks.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tea_rl.errors import TeaError

TAG_REWARDS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
UNTAGGED_REWARD = 1.0
_TAG = re.compile(r"<(r?)([+-]?\d+(?:\.\d+)?)>")
#: What people write who mean a tag and know no better: with a number (``<r=2>``, ``<r+>``), or not (``<rgood>``, ``<R2>``).
_NUMBERLIKE = re.compile(r"<r\s*(?:[-+=:_.\s]*\d[^<>\s,]{0,8}|[-+=:_.]{1,3})\s*/?>")
_WORDLIKE = re.compile(r"<r[-+=:_.]?\w*\s*/?>", re.IGNORECASE)
_CHOICE = ", ".join(f"<r{reward:g}>" for reward in TAG_REWARDS)


class Tagged(NamedTuple):
    """A text without its tag.

    Attributes:
        text: what is left.
        reward: what the tag says; None without one.
        doubtful: something like ``<3>`` or ``<region>``: an unknown tag if the rest of the file is tagged, else text.
    """

    text: str
    reward: float | None
    doubtful: str | None = None


def unknown_tag(tag: str) -> str:
    """The message about a tag that is not one of the six."""
    return f"unknown tag {tag}; choose one of {_CHOICE}."


def read_tag(text: str, place: str, beside_reward: bool = False) -> Tagged:
    """Find the tag of a completion, with or without the ``r``, and take it out.

    White space between the text and a tag at its end goes with the tag; a space before the text stays, for it is part of
    how the text continues its prompt. ``<rgood>`` at an end of the completion is taken for a tag that there is not, and so is
    anything like ``<r=2>``; a word in angle brackets elsewhere, or one that ``</rgood>`` closes, is text.

    Args:
        place: file and line, for errors.
        beside_reward: the row has a reward of its own, so that only a plain tag is looked for.

    Raises:
        TeaError: naming ``place``, for an unknown tag or two tags that disagree.

    >>> read_tag("The film was superb. <r2>", "line 1")
    Tagged(text='The film was superb.', reward=2.0, doubtful=None)
    """
    found: dict[float, str] = {}
    doubtful = None
    for match in _TAG.finditer(text):
        value = float(match[2])
        if value in TAG_REWARDS:
            found[value] = match[0]
        elif match[1]:
            raise TeaError(f"{place}: {unknown_tag(match[0])}")
        else:
            doubtful = match[0]
    if not beside_reward:
        doubtful = _slip(text, place) or doubtful
    if not found:
        return Tagged(text, None, doubtful)
    if len(found) > 1:
        raise TeaError(
            f"{place}: expected one tag for a completion, got {' and '.join(found.values())}; write one row for each."
        )
    reward = next(iter(found))
    left = _TAG.sub(lambda match: "\0" if float(match[2]) == reward else match[0], text)
    left = re.sub(r"\s*\0\s*$", "", left)
    left = re.sub(r"\s\0(?=\s)", "", left)  # of the white space on both sides of a tag, one is enough
    return Tagged(left.replace("\0", ""), reward, doubtful)


def _slip(text: str, place: str) -> str | None:
    """Something that may be meant as a tag: what can hardly be anything else raises, the first of the rest is returned."""
    for match in _NUMBERLIKE.finditer(text):
        if not _TAG.fullmatch(match[0]):
            raise TeaError(f"{place}: {unknown_tag(match[0])}")
    doubtful = None
    bare = text.strip()
    for match in _WORDLIKE.finditer(text):
        if _TAG.fullmatch(match[0]) or f"</{match[0][1:]}".lower() in text.lower():
            continue  # an element of a markup language
        if bare.startswith(match[0]) or bare.endswith(match[0]):
            raise TeaError(f"{place}: {unknown_tag(match[0])} If it is no tag, take other brackets.")
        doubtful = doubtful or match[0]
    return doubtful
