"""Built-in rewards.

Each name is a factory: it takes the settings of the recipe (``kwargs``), checks them once, and returns a function with TRL's
signature ``f(prompts, completions, **columns) -> list[float | None]``. That function can be handed to a TRL trainer as it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tea_rl.errors import TeaError, did_you_mean

RewardFunction = Callable[..., list[float | None]]

_WORD = re.compile(r"\w+")
_VOWELS = re.compile(r"[aeiouy]+")


def _needs(package: str, reward: str) -> TeaError:
    return TeaError(f'the reward "{reward}" needs the package {package}: pip install "tea-rl[rewards]".')


def sentiment(include_prompt: bool = True) -> RewardFunction:
    """How positive the text is: VADER's compound score, -1 to 1.

    Args:
        include_prompt: score the prompt followed by the completion, rather than the completion alone.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise _needs("vaderSentiment", "sentiment") from None
    analyzer = SentimentIntensityAnalyzer()

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)] if include_prompt else completions
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    return score


def length(target: int | None = None, min: int | None = None, max: int | None = None) -> RewardFunction:
    """How well the number of words fits: 1 at the target or inside min..max, falling to 0 with relative distance.

    Args:
        target: wanted number of words; or
        min, max: a range, open at the end that is left out.
    """
    low, high = (target, target) if target is not None else (min, max)
    given = {"target": target, "min": min, "max": max}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TeaError(
                f'the reward "length" expects {name} as a whole number of words, at least 1; got {value!r}.'
            )
    if low is None and high is None or target is not None and (min is not None or max is not None):
        raise TeaError(
            'the reward "length" needs kwargs {target: N}, or {min: N}, {max: N} or both of these.'
        )
    if low is not None and high is not None and low > high:
        raise TeaError(f'the reward "length" expects min up to max, got min {low} and max {high}.')

    def fit(text: str) -> float:
        words = len(text.split())
        if low is not None and words < low:
            return words / low
        if high is not None and words > high:
            return 1.0 - (words - high) / high if words < 2 * high else 0.0
        return 1.0

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [fit(text) for text in completions]

    return score


def repetition(threshold: float = 0.15) -> RewardFunction:
    """Penalty for repeated words: minus the share of repeated words beyond the threshold, -1 to 0.

    The share is 1 - distinct / total over lower-cased words; texts of fewer than two words have none.
    """
    _check_number("repetition", "threshold", threshold, 0.0, 1.0)

    def penalty(text: str) -> float:
        words = _WORD.findall(text.lower())
        share = 1.0 - len(set(words)) / len(words) if len(words) > 1 else 0.0
        return min(0.0, threshold - share)

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [penalty(text) for text in completions]

    return score


def echo(threshold: float = 0.2, n: int = 2) -> RewardFunction:
    """Penalty for phrases that other completions use, too: minus their share beyond the threshold, -1 to 0.

    What `repetition` is within a text, this is across the texts scored together (a rollout step, an evaluation batch):
    a policy that found one well-paid phrase is paid less for writing it everywhere.

    Args:
        threshold: share of a text's distinct phrases that may be common property; plain language has some.
        n: words in a phrase.
    """
    _check_number("echo", "threshold", threshold, 0.0, 1.0)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise TeaError(f'the reward "echo" expects n as a whole number of words, at least 1; got {n!r}.')

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        words = [_WORD.findall(text.lower()) for text in completions]
        phrases = [set(zip(*(text[i:] for i in range(n)), strict=False)) for text in words]
        users = Counter(phrase for used in phrases for phrase in used)
        shares = [sum(users[p] > 1 for p in used) / len(used) if used else 0.0 for used in phrases]
        return [min(0.0, threshold - share) for share in shares]

    return score


def regex(pattern: str, full: bool = False) -> RewardFunction:
    """1 if a regular expression is found in the completion (or matches all of it, with full), else 0."""
    if not isinstance(pattern, str):
        raise TeaError(f'the reward "regex" expects pattern as text, got {pattern!r}; put it in quotes.')
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TeaError(f'the reward "regex" cannot read the pattern "{pattern}": {error}.') from None
    test = compiled.fullmatch if full else compiled.search

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [float(test(text) is not None) for text in completions]

    return score


def exact_match(column: str = "answer", first_line: bool = True, strip: bool = True) -> RewardFunction:
    """1 if the completion equals the data's answer, else 0; rows without an answer are left out.

    Args:
        column: data column that holds the answer.
        first_line: compare the first line only (the first one with text in it, when strip is on).
        strip: ignore white space around completion and answer.
    """

    def expected(value: Any) -> str:
        # A table column of whole numbers with a gap in it is read as floats: 3.0 stands for 3.
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        return text.strip() if strip else text

    def heard(text: str) -> str:
        text = text.strip() if strip else text
        text = text.split("\n", 1)[0] if first_line else text
        return text.strip() if strip else text

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if column not in columns:
            known = ", ".join(columns) or "none"
            hint = did_you_mean(column, columns)
            raise TeaError(f'no data column "{column}" to compare with.{hint} Columns: {known}.')
        wanted = [None if w is None else expected(w) for w in columns[column]]
        return [None if w is None else float(heard(c) == w) for c, w in zip(completions, wanted, strict=True)]

    return score


def _read_schema(schema: Mapping[str, Any] | str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(Path(schema).read_text(encoding="utf-8"))
    except OSError as error:
        raise TeaError(f'the reward "json_schema" cannot read "{schema}": {error.strerror}.') from None
    except ValueError as error:
        raise TeaError(f'the reward "json_schema" expects JSON in "{schema}": {error}.') from None


def json_schema(schema: Mapping[str, Any] | str) -> RewardFunction:
    """1 if the completion is JSON that satisfies a schema, else 0.

    Args:
        schema: the JSON schema as a mapping, or the path of a .json file that holds it.
    """
    try:
        import jsonschema
        import referencing
        import referencing.exceptions
    except ImportError:
        raise _needs("jsonschema", "json_schema") from None
    loaded = _read_schema(schema)
    if not isinstance(loaded, (dict, bool)):
        raise TeaError(
            f'the reward "json_schema" expects a schema as a mapping, got {type(loaded).__name__}.'
        )
    kind = jsonschema.validators.validator_for(loaded, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(loaded)
    except jsonschema.SchemaError as error:
        raise TeaError(
            f'the reward "json_schema" got an invalid schema: {error.message} (at {error.json_path}).'
        ) from None
    # An empty registry: a remote $ref must fail rather than reach for the network.
    validator = kind(loaded, registry=referencing.Registry())

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def satisfied(text: str) -> float:
        try:
            return float(validator.is_valid(json.loads(text, parse_constant=refuse)))
        except (ValueError, RecursionError):
            return 0.0
        except referencing.exceptions.Unresolvable as error:
            raise TeaError(f'the schema refers to "{error.ref}", which is not inside it.') from None

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [satisfied(text) for text in completions]

    return score


def readability() -> RewardFunction:
    """How easy the text reads: Flesch reading ease / 100, cut to 0..1; 0 for a text without words.

    Reading ease = 206.835 - 1.015 words/sentences - 84.6 syllables/words (Flesch 1948). For English text.
    """
    try:
        from pyphen import Pyphen
    except ImportError:
        raise _needs("pyphen", "readability") from None
    hyphenation = Pyphen(lang="en_US")

    def ease(text: str) -> float:
        words = [word for word in re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())]
        if not words:
            return 0.0
        sentences = len(re.findall(r"[.!?]+(?=\s|$)", text.strip())) or 1
        # Hyphenation allows no break near a word's ends, vowel groups miss adjoining vowels: the larger count is closer.
        syllables = sum(
            max(1, len(hyphenation.positions(word)) + 1, len(_VOWELS.findall(word)) - word.endswith("e"))
            for word in words
        )
        score = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
        return min(1.0, max(0.0, score / 100.0))

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [ease(text) for text in completions]

    return score


def _check_number(reward: str, name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise TeaError(
            f'the reward "{reward}" expects {name} as a number from {low:g} to {high:g}, got {value!r}.'
        )


BUILTIN_REWARDS: dict[str, Callable[..., RewardFunction]] = {
    factory.__name__: factory
    for factory in (sentiment, length, repetition, echo, regex, exact_match, json_schema, readability)
}


def list_rewards() -> dict[str, str]:
    """Names of the built-in rewards with the first line of their help."""
    return {
        name: (factory.__doc__ or "").strip().splitlines()[0] for name, factory in BUILTIN_REWARDS.items()
    }
