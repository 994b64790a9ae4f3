"""What a labelled dataset holds, in figures: counts, rewards, lengths, and what would go wrong."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tea_rl.data.encode import encode_rows
from tea_rl.data.labelled import LabelledData
from tea_rl.data.split import SPLIT_COLUMN, row_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tea_rl.recipe import DataConfig

_BINS = 10
#: Stands for no limit at all.
_ENDLESS = 1 << 40


@dataclass
class Rewards:
    """Rewards of all rows.

    Attributes:
        histogram: ``from``, ``to`` and ``rows`` of each bar; every value has a bar of its own when there are few.
    """

    min: float
    mean: float
    max: float
    std: float
    distinct: int
    histogram: list[dict[str, float]]


@dataclass
class Lengths:
    """Lengths in tokens, prompt and end token included.

    Attributes:
        truncated: rows that ``max_length`` cuts.
        dropped: rows it leaves no completion of.
    """

    model: str
    median: int
    p95: int
    max: int
    completion_tokens: int
    max_length: int | None
    truncated: int
    dropped: int


@dataclass
class DataSummary:
    """Figures about the good rows of a source."""

    source: str
    format: str
    rows: int
    prompts: int
    pairs: int
    labels: dict[str, int]
    untagged: int
    splits: dict[str, int]
    rewards: Rewards | None
    lengths: Lengths | None = None
    warnings: list[str] = field(default_factory=list)


def summarise(data: LabelledData) -> DataSummary:
    """Count rows, prompts, pairs and labels, and describe the rewards."""
    rows = data.rows
    labels = Counter(str(row.label).lower() for row in rows if row.label is not None)
    rewards = [row.reward for row in rows if row.reward is not None]
    summary = DataSummary(
        source=data.source,
        format=data.format,
        rows=len(rows),
        prompts=len(set(row_groups(rows))),
        pairs=len({row.pair for row in rows if row.pair is not None}),
        labels=dict(sorted(labels.items(), reverse=True)),
        untagged=data.untagged,
        splits=dict(
            sorted(
                Counter(str(row.columns[SPLIT_COLUMN]) for row in rows if SPLIT_COLUMN in row.columns).items()
            )
        ),
        rewards=describe_rewards(rewards) if rewards else None,
    )
    if summary.rewards is not None and summary.rewards.distinct == 1:
        summary.warnings.append(
            f"all rewards are {summary.rewards.min:g}: rewards that do not differ hold nothing to learn"
        )
    if len(labels) == 1:
        summary.warnings.append(
            f"all labels are {next(iter(labels))}: labels that do not differ hold nothing to learn"
        )
    if data.untagged:
        summary.warnings.append(f"rows without a tag: {data.untagged}; their reward is 1")
    return summary


def describe_rewards(rewards: Sequence[float]) -> Rewards:
    """Spread and histogram of at least one reward."""
    counts = Counter(rewards)
    low, high = min(rewards), max(rewards)
    if len(counts) <= _BINS:
        edges = [(value, value, counts[value]) for value in sorted(counts)]
    else:
        inside = Counter(min(int((value - low) / (high - low) * _BINS), _BINS - 1) for value in rewards)
        marks = [low + (high - low) * i / _BINS for i in range(_BINS)]
        edges = [
            (start, end, inside[i])
            for i, (start, end) in enumerate(zip(marks, [*marks[1:], high], strict=True))
        ]
    bars = [{"from": start, "to": end, "rows": count} for start, end, count in edges]
    mean = statistics.fmean(rewards)
    return Rewards(low, mean, high, statistics.pstdev(rewards, mean), len(counts), bars)


def describe_lengths(
    data: LabelledData,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    model: str,
) -> Lengths:
    """Lengths of rows as they would be trained on.

    Args:
        max_length: the limit to count by, in tokens; None for none.
        model: name of the tokenizer's model, for people.

    Raises:
        TeaError: if the chat template refuses a prompt.
    """
    unlimited = config.model_copy(update={"max_length": None})
    encoded, _ = encode_rows(data, unlimited, tokenizer, tokenizer.eos_token_id, _ENDLESS)
    sizes = sorted(len(row.prompt_ids) + len(row.completion_ids) for row in encoded)
    limit = max_length or _ENDLESS
    dropped = sum(len(row.prompt_ids) >= limit for row in encoded)
    return Lengths(
        model=model,
        median=sizes[len(sizes) // 2],
        p95=sizes[min(int(len(sizes) * 0.95), len(sizes) - 1)],
        max=sizes[-1],
        completion_tokens=sum(len(row.completion_ids) for row in encoded),
        max_length=max_length,
        truncated=sum(size > limit for size in sizes) - dropped,
        dropped=dropped,
    )
