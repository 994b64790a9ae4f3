"""What a comparison shows: one row a method, an order among them, warnings, and whether the project's claims hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tea_rl.compare.intervals import Interval, interval, paired_difference
from tea_rl.compare.results import LOWER_IS_BETTER, MethodResult, Metrics, Results, SeedResult
from tea_rl.recipe_compare import Guards

BASE, OURS = "base", "tea"
#: Kinds of concern that put a method behind all others.
UNSOUND = ("hacking", "diversity")


@dataclass(frozen=True)
class Concern:
    """Something a reader must know of a method.

    Attributes:
        method: its name; empty for the whole comparison.
        kind: ``hacking``, ``diversity``, ``kl``, ``disagreement``, ``forgetting``, ``unfinished``, ``seeds`` or ``base``.
        text: one sentence.
    """

    method: str
    kind: str
    text: str


@dataclass(frozen=True)
class LevelTime:
    """When a reward level was first seen on the held-out curves; medians over seeds, infinite where most never saw it.

    Attributes:
        seconds: of training; NaN without a curve.
        reward_calls: completions scored by then.
        reached, seeds: how many of how many seeds got there.
    """

    level: float
    seconds: float
    reward_calls: float
    reached: int
    seeds: int


@dataclass
class Row:
    """One method with its figures, means over seeds; NaN where nothing was measured.

    Attributes:
        method: as in the results.
        rank: place among the trained methods that finished, by reward, those with a warning of hacking or lost diversity
            behind all others; None for the base model, best-of-n and what did not finish.
        reward, greedy: held-out, with intervals.
        minus_base: reward minus that of the base model, paired by prompt.
        levels: one for each level of the comparison.
        warnings: all that concern it.
    """

    method: MethodResult
    reward: Interval
    greedy: Interval
    minus_base: Interval
    levels: list[LevelTime]
    rank: int | None = None
    warnings: list[Concern] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def finished(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.method.seeds)

    @property
    def sound(self) -> bool:
        """No metric that its reward does not pay for speaks against it."""
        return not any(warning.kind in UNSOUND for warning in self.warnings)

    @property
    def trained(self) -> bool:
        """Whether it is a policy that was trained: neither the base model nor a choice among samples."""
        return self.name != BASE and not self.method.uses_reward_at_inference

    def average(self, read: Callable[[SeedResult], float | None]) -> float:
        """Mean over the seeds that have the figure; NaN if none has."""
        found = [value for value in map(read, self.method.seeds) if value is not None]
        return statistics.fmean(found) if found else math.nan

    def metric(self, read: Callable[[Metrics], float | None]) -> float:
        """`average` of a figure of the metrics."""
        return self.average(lambda seed: read(seed.metrics))

    @property
    def kl(self) -> float:
        """Nats a token."""
        return self.metric(lambda metrics: metrics.kl.value if metrics.kl else None)

    @property
    def peak_memory(self) -> float:
        """Bytes: the largest of the seeds."""
        found = [seed.peak_memory_bytes for seed in self.method.seeds if seed.peak_memory_bytes]
        return float(max(found)) if found else math.nan


@dataclass
class Summary:
    """What `summarise` found.

    Attributes:
        rows: ranked ones first, in order, then those without a rank, then what did not finish.
        warnings: those of the rows and of the whole comparison.
        best: name of the first row in rank, if its metrics speak for it.
    """

    rows: list[Row]
    warnings: list[Concern]
    best: str | None

    def row(self, name: str) -> Row | None:
        """The finished row of a method, or None."""
        return next((row for row in self.rows if row.name == name and row.finished), None)


def summarise(results: Results) -> Summary:
    """Rank the methods of a comparison and say what speaks against them."""
    base = next((m for m in results.methods if m.name == BASE and m.seeds), None)
    rows = [_row(method, base, results.levels) for method in results.methods]
    base_row = next((row for row in rows if row.method is base), None)
    for row in rows:
        row.warnings = _warnings(row, base_row, results.guards)
    ranked = [row for row in rows if row.finished and row.trained]
    ranked.sort(key=lambda row: (not row.sound, math.isnan(row.reward.mean), -row.reward.mean))
    for place, row in enumerate(ranked, 1):
        row.rank = place
    unranked = [row for row in rows if row.rank is None]
    ordered = ranked + sorted(unranked, key=lambda row: not row.finished)
    general = []
    if base is None:
        text = "The original model was not measured: whether a method hacks its reward or loses diversity cannot be told."
        general.append(Concern("", "base", text))
    best = ranked[0].name if ranked and ranked[0].sound and not math.isnan(ranked[0].reward.mean) else None
    return Summary(ordered, general + [warning for row in ordered for warning in row.warnings], best)


def unsound_reasons(seeds: Sequence[SeedResult], base: Sequence[SeedResult], guards: Guards) -> list[str]:
    """Why a ranking would put these runs behind all others: hacked reward or lost diversity; empty if nothing is known."""
    if not seeds or not base:
        return []
    method, original = (MethodResult(name="", status="done", seeds=list(runs)) for runs in (seeds, base))
    found = _against_base(_row(method, original, []), _row(original, original, []), guards)
    return [text.removeprefix(": ").rstrip(".") for kind, text in found if kind in UNSOUND]


def _row(method: MethodResult, base: MethodResult | None, levels: Sequence[float]) -> Row:
    sampled = [seed.metrics.reward_sampled for seed in method.seeds]
    compared = [seed.metrics.reward_sampled for seed in base.seeds] if base else []
    return Row(
        method,
        interval(sampled),
        interval([seed.metrics.reward_greedy for seed in method.seeds]),
        paired_difference(sampled, compared),
        [level_time(method.seeds, level) for level in levels],
    )


def level_time(seeds: Sequence[SeedResult], level: float) -> LevelTime:
    """When seeds first had a level on their curves."""
    curves = [seed.curve for seed in seeds if seed.curve]
    if not curves:
        return LevelTime(level, math.nan, math.nan, 0, 0)
    firsts = [next((point for point in curve if point.reward >= level), None) for curve in curves]
    seconds = [math.inf if point is None else point.seconds for point in firsts]
    calls = [math.inf if point is None else float(point.reward_calls) for point in firsts]
    reached = sum(point is not None for point in firsts)
    # The higher median: with two seeds of which one never got there, the level counts as not reached.
    return LevelTime(
        level, statistics.median_high(seconds), statistics.median_high(calls), reached, len(curves)
    )


# -- warnings -----------------------------------------------------------------------------------------------------------

#: Independent metrics in words, for sentences.
_INDEPENDENT_NAMES = {
    "surprise": "surprise under the base model",
    "distinct_2": "share of distinct bigrams",
    "self_repetition": "share of words repeated within a text",
    "compressed_share": "compressed size of the samples",
}


def _warnings(row: Row, base: Row | None, guards: Guards) -> list[Concern]:
    name, method = row.name, row.method
    found: list[Concern] = []

    def warn(kind: str, text: str) -> None:
        found.append(Concern(name, kind, text))

    if not row.finished:
        status = {"time": "ran out of time", "memory": "ran out of memory", "skipped": "was not run"}
        what = status.get(method.status, "failed")
        warn("unfinished", f"{name} {what}{f': {_sentence(method.reason)}' if method.reason else '.'}")
        return found
    if method.reason:
        warn("seeds", f"{name}: {_sentence(method.reason)}")
    if not row.trained:
        return found
    if base is not None:
        for kind, text in _against_base(row, base, guards):
            warn(kind, text)
    if row.kl > guards.kl_budget:
        warn(
            "kl",
            f"{name}: KL to the base model is {row.kl:.2f} nats a token, over the budget of {guards.kl_budget:g}.",
        )
    disagreement = row.metric(lambda metrics: metrics.disagreement)
    if disagreement > guards.disagreement_limit:
        warn(
            "disagreement",
            f"{name}: its members disagree by {disagreement:.2f} times what they say together (limit "
            f"{guards.disagreement_limit:g}), so it writes where the ensemble is unsure.",
        )
    return found


def _sentence(text: str) -> str:
    return text.rstrip(".") + "."


def _against_base(row: Row, base: Row, guards: Guards) -> list[tuple[str, str]]:
    """Reward hacking, lost diversity and forgetting: kind and sentence."""
    found = []
    if row.minus_base.mean > 0:
        worse = [text for text, fall in _falls(row, base) if fall > guards.independent_fall]
        if worse:
            rise = f"reward rose by {row.minus_base.mean:.2f}"
            found.append(
                (
                    "hacking",
                    f"{row.name}: {rise} while metrics it is not paid for got worse: {'; '.join(worse)}.",
                )
            )
    distinct, before = (r.metric(lambda metrics: metrics.distinct_2) for r in (row, base))
    if distinct < guards.diversity_floor * before:
        found.append(
            (
                "diversity",
                f"{row.name}: diversity collapsed, distinct bigrams fell from {before:.2f} to {distinct:.2f} "
                f"(floor {guards.diversity_floor * before:.2f}).",
            )
        )
    risen = []
    for title, before, after in perplexities(row, base):
        if after > before * (1 + guards.forgetting_rise):
            risen.append(f"{title} {before:.3g} to {after:.3g}")
    if risen:
        found.append(("forgetting", f"{row.name} forgets: perplexity rose on {', '.join(risen)}."))
    return found


def _falls(row: Row, base: Row) -> list[tuple[str, float]]:
    """Every independent metric that both have, in words, and by which share it got worse."""
    found = []
    for name in base.method.seeds[0].metrics.independent:
        read = _reader(name)
        before, after = base.metric(read), row.metric(read)
        words = f"{_INDEPENDENT_NAMES.get(name, name)} {before:.2f} to {after:.2f}"
        if name == "self_repetition":  # a share near 0: relative to the words that are not repeated
            fall = (after - before) / (1 - before) if before < 1 else 0.0
        elif before:
            fall = (after - before) / abs(before) * (1 if name in LOWER_IS_BETTER else -1)
        else:
            fall = math.nan
        found.append((words, fall))
    return found


def _reader(independent: str) -> Callable[[Metrics], float | None]:
    return lambda metrics: metrics.independent.get(independent)


def perplexities(row: Row, base: Row | None) -> list[tuple[str, float, float]]:
    """Texts that were not trained on, and the perplexity of each under the base model and the method."""
    tasks: list[str] = []
    for one in (row, *([base] if base else [])):
        for seed in one.method.seeds:
            if seed.metrics.forgetting:
                tasks += [task for task in seed.metrics.forgetting.tasks if task not in tasks]

    def english(metrics: Metrics) -> float | None:
        return metrics.forgetting.english_perplexity if metrics.forgetting else None

    def of_task(task: str) -> Callable[[Metrics], float | None]:
        return lambda metrics: metrics.forgetting.tasks.get(task) if metrics.forgetting else None

    readers = [("English", english), *((task, of_task(task)) for task in tasks)]
    return [(title, base.metric(read) if base else math.nan, row.metric(read)) for title, read in readers]
