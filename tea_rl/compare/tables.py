"""The tables of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tea_rl.compare.claims import AgainstPeer, against_peer
from tea_rl.compare.intervals import Interval
from tea_rl.compare.results import Metrics, Results, Tried
from tea_rl.compare.summary import OURS, LevelTime, Row, Summary, perplexities
from tea_rl.evaluation.report_parts import escape, number

#: What a method that did not finish is said to have done.
STATUS_WORDS = {
    "done": "done",
    "failed": "failed",
    "time": "ran out of time",
    "memory": "ran out of memory",
    "skipped": "not run",
}
_DASH = "&ndash;"


class Column(NamedTuple):
    """A column: its heading (HTML) and what stands in it for a row (HTML)."""

    heading: str
    cell: Callable[[Row], str]


def duration(seconds: float) -> str:
    """Seconds for people; nothing measured is a dash."""
    if math.isnan(seconds):
        return _DASH
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def size(count: float, unit: str = "B") -> str:
    """Bytes or a number of things with a prefix."""
    if math.isnan(count):
        return _DASH
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return (
                f"{count / factor:.2f} {prefix}{unit}"
                if factor == 1e9
                else f"{count / factor:.1f} {prefix}{unit}"
            )
    return f"{count:.0f} {unit}".strip()


def gigabytes(count: float) -> str:
    """Bytes in GB, so that a column of them can be read down."""
    return _DASH if math.isnan(count) else f"{count / 1e9:.2f} GB"


def figure(value: float, digits: int = 2) -> str:
    """A number with so many decimals; NaN is a dash."""
    return _DASH if math.isnan(value) else f"{value:.{digits}f}"


def spread(interval: Interval) -> str:
    """A mean with its interval."""
    if math.isnan(interval.mean):
        return _DASH
    return f"{interval.mean:.2f} <small>{interval.low:.2f} to {interval.high:.2f}</small>"


def summary_table(results: Results, summary: Summary, colours: dict[str, str]) -> str:
    """Who did how well at what price: a line for each method that was asked for, finished or not."""
    edges = [edge for row in summary.rows if row.finished for edge in row.reward if math.isfinite(edge)]
    low, high = min([0.0, *edges]), max([1.0, *edges])
    columns = [
        Column(
            "Held-out reward<br><small>95 % interval</small>",
            lambda row: spread(row.reward) + _bar(row, colours[row.name], low, high),
        ),
        Column("Greedy", lambda row: figure(row.greedy.mean)),
        Column("KL to base<br><small>nats a token</small>", _kl),
        *(
            Column(
                f"{level:g} after<br><small>reward level</small>",
                _at_level(place, level_cell),
            )
            for place, level in enumerate(results.levels)
        ),
        Column("Peak<br>memory", lambda row: gigabytes(row.peak_memory)),
        Column(
            "Trained<br><small>parameters</small>",
            lambda row: size(row.average(lambda s: float(s.trainable_parameters)), ""),
        ),
        Column("Seeds", lambda row: str(len(row.method.seeds))),
    ]
    return table("summary", columns, summary.rows, colours, ranked=True)


def detail_table(results: Results, summary: Summary, colours: dict[str, str]) -> str:
    """What else was measured of each method."""
    rows = [row for row in summary.rows if row.finished]
    terms = list(
        dict.fromkeys(term for row in rows for seed in row.method.seeds for term in seed.metrics.terms)
    )
    others = {
        name: None for row in rows for seed in row.method.seeds for name in seed.metrics.independent
        if name not in ("surprise", "distinct_2", "self_repetition")
    }  # fmt: skip
    read = {"compressed_share": "Compressed size<br><small>of the samples</small>"}
    columns = [
        Column(
            "Reward over base<br><small>paired</small>",
            lambda row: _signed(row.minus_base) if row.name != "base" else _DASH,
        ),
        Column("KL<br><small>Monte-Carlo</small>", lambda row: figure(row.metric(_monte_carlo))),
        *(Column(f"{escape(term)}<br><small>reward term</small>", _term(term)) for term in terms),
        Column(
            "Surprise<br><small>under base, nats</small>",
            lambda row: figure(row.metric(lambda m: m.surprise)),
        ),
        Column("Distinct<br><small>words</small>", lambda row: figure(row.metric(lambda m: m.distinct_1))),
        Column("Distinct<br><small>bigrams</small>", lambda row: figure(row.metric(lambda m: m.distinct_2))),
        Column(
            "Repeated words<br><small>in a text</small>",
            lambda row: figure(row.metric(lambda m: m.self_repetition)),
        ),
        *(
            Column(read.get(name, f"{escape(name)}<br><small>independent</small>"), _independent(name))
            for name in others
        ),
        Column("Length<br><small>tokens</small>", lambda row: figure(row.metric(lambda m: m.length), 1)),
        Column(
            "Disagreement<br><small>of members</small>",
            lambda row: figure(row.metric(lambda m: m.disagreement)),
        ),
    ]
    return table("details", columns, rows, colours)


def cost_table(results: Results, summary: Summary, colours: dict[str, str]) -> str:
    """What each method took and leaves behind."""
    calls = [
        Column(
            f"Reward {level:g} after<br><small>scored completions</small>",
            _at_level(place, calls_cell),
        )
        for place, level in enumerate(results.levels)
    ]
    columns = [
        Column("Training<br><small>wall-clock</small>", lambda row: duration(row.average(lambda s: s.train_seconds)) if row.trained else _DASH),
        Column("Scored<br><small>completions</small>", lambda row: size(row.average(lambda s: float(s.reward_calls)), "")),
        *calls,
        Column("On disk", lambda row: size(row.average(lambda s: None if s.size_on_disk_bytes is None else float(s.size_on_disk_bytes)))),
        Column("Generation after<br><small>tokens a second</small>", lambda row: figure(row.average(lambda s: s.generation_tokens_per_second), 0)),
    ]  # fmt: skip
    return table("costs", columns, [row for row in summary.rows if row.finished], colours)


def forgetting_table(summary: Summary, colours: dict[str, str]) -> str:
    """Perplexity on other text, and its change against the base model; empty where nothing was measured."""
    base = summary.row("base")
    rows = [
        row for row in summary.rows if row.finished and any(s.metrics.forgetting for s in row.method.seeds)
    ]
    if not rows:
        return ""
    titles = list(dict.fromkeys(title for row in rows for title, _, _ in perplexities(row, base)))

    def cell(title: str) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            found = next((values for name, *values in perplexities(row, base) if name == title), None)
            if found is None or math.isnan(found[1]):
                return _DASH
            before, after = found
            change = ""
            if row.name != "base" and before > 0:
                change = f" <small>{round((after / before - 1) * 100):+d} %</small>"
            return f"{after:.3g}{change}"

        return text

    columns = [Column(escape(title.replace("_", " ")), cell(title)) for title in titles]
    return table("forgetting", columns, rows, colours)


def peers_table(results: Results, summary: Summary, colours: dict[str, str]) -> str:
    """Ours against each trained peer; empty without both."""
    ours = summary.row(OURS)
    peers = [row for row in summary.rows if row.finished and row.trained and row.name != OURS]
    if ours is None or not peers:
        return ""
    found = {
        (row.name, level): against_peer(ours, row, level)
        for row in peers
        for level in results.levels or [math.nan]
    }
    any_level = (results.levels or [math.nan])[0]

    def of(row: Row, level: float = any_level) -> AgainstPeer:
        return found[row.name, level]

    def sooner_to(level: float) -> Callable[[Row], str]:
        return lambda row: _sooner(of(row, level))

    columns = [
        *(
            Column(
                f"Reward {level:g}<br><small>sooner by</small>",
                sooner_to(level),
            )
            for level in results.levels
        ),
        Column("Memory<br><small>theirs / ours</small>", lambda row: _times(of(row).memory)),
        Column("Parameters<br><small>theirs / ours</small>", lambda row: _times(of(row).parameters)),
        Column(
            "Reward<br><small>ours &minus; theirs, paired</small>",
            lambda row: _signed(Interval(*of(row).reward)),
        ),
        Column("At their KL<br><small>ours &minus; theirs</small>", lambda row: _plus(of(row).at_equal_kl)),
    ]
    return table("peers", columns, peers, colours)


def tried_table(results: Results) -> str:
    """Every learning rate that was tried, and the one that is shown; empty where there was no choice."""
    lines = [
        _tried(method.name, one, method.learning_rate, len(method.tried))
        for method in results.methods
        for one in method.tried
    ]
    if not lines:
        return ""
    head = "".join(
        f"<th{' class=num' if place > 0 and title in ('Learning rate', 'Held-out reward', 'Training') else ''}>{title}</th>"
        for place, title in enumerate(("Method", "Learning rate", "Held-out reward", "Training", "Outcome"))
    )
    return f'<div class="scroll"><table id="tried"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _tried(method: str, one: Tried, shown: float | None, count: int) -> str:
    rate = _DASH if one.learning_rate is None else f"{one.learning_rate:g}"
    reward = _DASH if one.reward is None else figure(one.reward)
    seconds = _DASH if one.seconds is None else duration(one.seconds)
    outcome = STATUS_WORDS[one.status] + (f": {escape(one.reason)}" if one.reason else "")
    outcome += f"; passed over: {escape(one.passed_over)}" if one.passed_over else ""
    chosen = one.status == "done" and one.learning_rate == shown and count > 1
    mark = '<span class="tag soft">shown</span>' if chosen else ""
    return (
        f'<tr><td class="method">{escape(method)}</td><td class="num">{rate}</td><td class="num">{reward}</td>'
        f'<td class="num">{seconds}</td><td class="text">{outcome}{mark}</td></tr>'
    )


def table(
    name: str, columns: Sequence[Column], rows: Sequence[Row], colours: dict[str, str], ranked: bool = False
) -> str:
    """A table with a line for each method; what did not finish has one cell with the reason."""
    head = "".join(f'<th class="num">{column.heading}</th>' for column in columns)
    body = []
    for row in rows:
        title = f'<span class="chip" style="--c:{colours[row.name]}"></span>{escape(row.name)}'
        if ranked and row.rank is not None:
            title = f"{row.rank}. {title}"
        if row.finished:
            cells = "".join(f'<td class="num">{column.cell(row)}</td>' for column in columns)
        else:
            reason = f": {escape(row.method.reason)}" if row.method.reason else ""
            cells = (
                f'<td class="text" colspan="{len(columns)}">{STATUS_WORDS[row.method.status]}{reason}</td>'
            )
        body.append(
            f'<tr class="{_classes(row)}"><td class="method">{title}{_tags(row) if ranked else ""}</td>{cells}</tr>'
        )
    return (
        f'<div class="scroll"><table id="{name}"><thead><tr><th class="method">Method</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _classes(row: Row) -> str:
    if not row.finished:
        return "off"
    return "ours" if row.name == OURS else "suspect" if not row.sound else ""


def _tags(row: Row) -> str:
    tags = ""
    if row.finished and not row.sound:
        tags += '<span class="tag">suspect</span>'
    if row.method.uses_reward_at_inference:
        tags += '<span class="tag soft">reward at inference</span>'
    return tags


def _bar(row: Row, colour: str, low: float, high: float) -> str:
    """The interval as a bar, the mean as a mark in it."""
    if math.isnan(row.reward.mean):
        return ""
    left, middle, right = (
        100 * (value - low) / (high - low) for value in (row.reward.low, row.reward.mean, row.reward.high)
    )
    return (
        f'<span class="bar" style="--c:{colour}" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
        f'<b style="left:{middle:.1f}%"></b></span>'
    )


def _kl(row: Row) -> str:
    kinds = {seed.metrics.kl.kind for seed in row.method.seeds if seed.metrics.kl}
    if not kinds:
        return _DASH
    value = f"{row.kl:.2f}" if row.kl >= 0.095 or row.kl == 0 else f"{row.kl:.2g}"
    return f"{value} <small>{' / '.join(sorted(kinds))}</small>"


def _at_level(place: int, cell: Callable[[LevelTime], str]) -> Callable[[Row], str]:
    return lambda row: cell(row.levels[place])


def level_cell(time: LevelTime) -> str:
    """When a level was seen, and by how many seeds where not by all."""
    return _reached(time, duration(time.seconds))


def calls_cell(time: LevelTime) -> str:
    """The same in scored completions."""
    return _reached(time, _DASH if math.isnan(time.reward_calls) else f"{time.reward_calls:.0f}")


def _reached(time: LevelTime, text: str) -> str:
    if not time.seeds:
        return _DASH
    seeds = f" <small>{time.reached} of {time.seeds} seeds</small>" if 0 < time.reached < time.seeds else ""
    return ("<small>not reached</small>" if math.isinf(time.seconds) else text) + seeds


def _sooner(found: AgainstPeer) -> str:
    if math.isnan(found.sooner):
        return _DASH
    return (
        f"at least {found.sooner:.1f}&times; <small>not reached within {found.peer_seconds:.0f} s</small>"
        if found.peer_never
        else _times(found.sooner)
    )


def _times(ratio: float) -> str:
    return _DASH if math.isnan(ratio) else f"{ratio:.1f}&times;"


def _plus(value: float) -> str:
    return _DASH if math.isnan(value) else f"{value:+.2f}"


def _signed(interval: Interval) -> str:
    if math.isnan(interval.mean):
        return _DASH
    return f"{interval.mean:+.2f} <small>{interval.low:+.2f} to {interval.high:+.2f}</small>"


def _monte_carlo(metrics: Metrics) -> float | None:
    return metrics.kl.monte_carlo if metrics.kl else None


def _term(name: str) -> Callable[[Row], str]:
    return lambda row: number(row.metric(lambda metrics: metrics.terms.get(name)))


def _independent(name: str) -> Callable[[Row], str]:
    return lambda row: figure(row.metric(lambda metrics: metrics.independent.get(name)))
