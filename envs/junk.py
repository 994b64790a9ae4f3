"""Actions nobody should be paid for, to try an environment with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

#: Empty, white space, control characters, other alphabets, half a surrogate pair, markup, huge: all sorts of answers.
FIXED = (
    "", " ", "\n", "\t \r\n", ".", "...", "\x00", "\x00\x01\x02\x1b[31m", "\ufeff", "\u200b", "\u202e", "\ud800",
    "ß", "ÄÖÜ", "答え", "🎉🎉", "٣", "²", "½", "Ⅷ", "-1", "+1", "1e9", "0x10", "1_0", "NaN", "inf", "None", "null",
    "[", "[]", "[[", "[ ]", "()", "{}", "\\", "\\d+", "(a+)+$", "%s%n", "{0}", "'; --", "<|im_end|>", "<tool>", "``",
    "I do not know.", "the answer", "yes and no", "a" * 100_000, "9" * 10_000, "[" * 10_000, "\n" * 10_000,
    "[" + "1" * 5_000 + "]", "lorem ipsum " * 5_000,
)  # fmt: skip

#: Ways to hide an answer in something that is not one. Each asks for the environment to refuse the whole.
HIDING = (
    "The answer is {}", "{} is it", "x{}", "{}x", "{0} {0}", "not {}", "{} or so", "{}\nand more", "first\n{}", "\x00{}",
    "{}\x00", "{}\u200b", "<b>{}</b>", "{}, maybe", "maybe {} or something else", "¿{}?", "{}!?", "1000{}", "{}.5",
    "lorem ipsum {} dolor sit amet",
)  # fmt: skip

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz ",
    "".join(map(chr, range(32, 127))),
    "".join(map(chr, range(0, 32))),
    "äßéøλжש世界ءन🎉\u200b\u202e",
    "[]{}()<>\\\n\t\"'",
)


def hidden(answers: Sequence[str], frames: Sequence[str] = HIDING, others: Sequence[str] = ()) -> list[str]:
    """Every answer inside of every frame, except where that is another of the answers, or of the ``others``."""
    known = {answer.casefold() for answer in (*answers, *others)}
    texts = (frame.format(answer) for answer in answers for frame in frames)
    return [text for text in texts if text.strip().removesuffix(".").casefold() not in known]


def junk(count: int, answers: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """``count`` junk actions: the fixed ones, hidden answers, then random characters.

    Args:
        count: how many.
        answers: real answers to hide.
        rng: draws the random ones.
    """
    listed = [*FIXED, *hidden(list(answers)[: max(1, count // (4 * len(HIDING)))])]
    yield from listed[:count]
    for _ in range(count - len(listed)):
        alphabet = _ALPHABETS[int(rng.integers(len(_ALPHABETS)))]
        letters = rng.integers(len(alphabet), size=int(rng.integers(1, 60)))
        yield "".join(alphabet[letter] for letter in letters)
