"""The page of a comparison: one HTML file that needs nothing beside it, made from ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tea_rl.compare.claims import judge_claims
from tea_rl.compare.intervals import paired_difference
from tea_rl.compare.plots import Picture, draw_all, method_colours
from tea_rl.compare.results import RESULTS_NAME, Results, Sample, read_results
from tea_rl.compare.summary import BASE, OURS, Row, Summary, summarise
from tea_rl.compare.tables import (
    cost_table,
    detail_table,
    forgetting_table,
    peers_table,
    summary_table,
    tried_table,
)
from tea_rl.errors import TeaError
from tea_rl.evaluation.report_parts import (
    clean,
    escape,
    flatten,
    html_page,
    json_for_script,
    pairs,
    setting_groups,
)
from tea_rl.training.files import atomic_write_bytes, atomic_write_text, disk_errors
from tea_rl.training.run_directory import REPORT_NAME

#: Heading and explanation of each plot.
_CAPTIONS = {
    "reward-time": (
        "Reward against time",
        "Small held-out evaluations during training; the line is the mean over seeds, the band reaches from the least to the "
        "most of them. Equal distances are equal ratios. Loading and evaluation are not counted; dotted: the levels looked up.",
    ),
    "reward-calls": (
        "Reward against reward calls",
        "The same evaluations against the completions that were scored to learn from.",
    ),
    "frontier": (
        "Reward against distance from the base model",
        "Ours at other strengths of the trained head, nothing retrained: the numbers on the line; the diamond is strength 1. "
        "Bars are 95 % intervals. Hollow: not trained, or suspect.",
    ),
    "memory": (
        "Peak memory",
        "Each method ran in a process of its own; this is the most memory it held while training.",
    ),
}
_KIND_WORDS = {
    "hacking": "Reward hacking",
    "diversity": "Diversity",
    "kl": "KL budget",
    "disagreement": "Disagreement",
    "forgetting": "Forgetting",
    "unfinished": "Not finished",
    "seeds": "Incomplete",
    "base": "No reference",
}


def write_comparison(folder: str | Path) -> Path:
    """Write ``report.html`` and a PNG of every plot into a comparison's folder, from its ``results.json``.

    Returns:
        path of the page.

    Raises:
        TeaError: if the folder holds no results, or they are damaged, or the disk refuses.
    """
    folder = Path(folder)
    if not (folder / RESULTS_NAME).is_file():
        raise TeaError(
            f"expected the folder of a comparison, but {folder} holds no {RESULTS_NAME}; give one made by `tea-rl compare`"
        )
    results = read_results(folder)
    summary = summarise(results)
    pictures = draw_all(results, summary)
    page = render(results, summary, pictures)
    with disk_errors(f"write {folder / REPORT_NAME}", "run `tea-rl report` on the folder"):
        for picture in pictures:
            atomic_write_bytes(folder / f"{picture.name}.png", picture.png)
        atomic_write_text(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def render(results: Results, summary: Summary, pictures: Sequence[Picture]) -> str:
    """The page as text."""
    colours = method_colours(results)
    here = files("tea_rl.compare")
    parts = [
        _header(results, summary),
        _claims(results, summary),
        _warnings(summary),
        _section(
            "Summary",
            summary_table(results, summary, colours),
            "Ranked by held-out reward; methods whose independent metrics speak against them come last. Base model and "
            "best-of-n are references and have no rank."
            if summary.rows
            else "",
        ),
        _plots(pictures),
        _section(
            "Ours against each peer",
            peers_table(results, summary, colours),
            "Above 1&times; speaks for ours. &ldquo;At their KL&rdquo; reads our frontier where it is as far from the base "
            "model as the peer is.",
        ),
        _section(
            "Forgetting",
            forgetting_table(summary, colours),
            "Perplexity, a token, of text that was not trained on: less is better. English is Python&rsquo;s language "
            "reference; the others are reasoning-gym questions with their answers." + _no_tasks(results),
        ),
        _section(
            "In detail",
            detail_table(results, summary, colours) if any(row.finished for row in summary.rows) else "",
            "Means over the sampled held-out completions. Over base: paired by prompt.",
        ),
        _section(
            "Cost", cost_table(results, summary, colours) if any(row.finished for row in summary.rows) else ""
        ),
        _browser(summary, colours),
        _section(
            "Learning rates tried",
            tried_table(results),
            "The best of each method is what this page shows: the one with most reward among those that neither hack it nor lost "
            "their diversity, or among all where none is left.",
        ),
        _method(results),
        _settings(results),
    ]
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return html_page(f"{results.recipe}: comparison", parts, style, script)


def _section(title: str, body: str, note: str = "") -> str:
    """A part of the page; none where there is nothing to show."""
    text = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{text}{body}</section>" if body else ""


def _header(results: Results, summary: Summary) -> str:
    finished = sum(row.finished for row in summary.rows)
    facts = [
        escape(str(_recipe(results).get("model", {}).get("name_or_path", ""))),
        f"{finished} of {len(summary.rows)} methods finished",
        escape(_machine(results.machine)),
        escape(results.created[:16].replace("T", " ")),
    ]
    return (
        f"<header><h1>{escape(results.recipe)}: methods compared</h1>{_lead(summary)}"
        f'<p class="facts">{" &middot; ".join(fact for fact in facts if fact)}</p></header>'
    )


def _recipe(results: Results) -> dict[str, Any]:
    """The resolved recipe, by group."""
    recipe = results.settings.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _machine(machine: dict[str, Any]) -> str:
    facts = [str(machine["processor"])] if machine.get("processor") else []
    facts += [f"{machine['cores']} cores"] if machine.get("cores") else []
    memory = machine.get("memory_bytes")
    return ", ".join(facts + ([f"{memory / 1e9:.0f} GB"] if isinstance(memory, int | float) else []))


def _lead(summary: Summary) -> str:
    """The result in words."""
    ranked = [row for row in summary.rows if row.rank is not None]
    if not ranked:
        return '<p class="lead">No trained method finished, so there is nothing to rank.</p>'
    if summary.best is None:
        return '<p class="lead">No method leads: metrics that the reward does not pay for speak against every one that finished.</p>'
    first, base = ranked[0], summary.row(BASE)
    low, high = first.reward.low, first.reward.high
    text = f"<b>{escape(first.name)}</b> leads with a held-out reward of {first.reward.mean:.2f} ({low:.2f} to {high:.2f})"
    text += f", from {base.reward.mean:.2f} of the base model." if base else "."
    return f'<p class="lead">{text} {_second(first, ranked[1:])}{_suspects(ranked)}</p>'


def _second(first: Row, others: Sequence[Row]) -> str:
    """How surely the leader leads."""
    other = next((row for row in others if row.sound), None)
    if other is None:
        return "There is no other method to rank it against. "
    rewards = [[seed.metrics.reward_sampled for seed in row.method.seeds] for row in (first, other)]
    gap = paired_difference(*rewards)
    name, figures = (
        escape(other.name),
        f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f}), paired by prompt",
    )
    if gap.low > 0:
        return f"That is {figures}, against {name}, the next. "
    return f"It cannot be told apart from {name}: {figures}. "


def _suspects(ranked: Sequence[Row]) -> str:
    most = max(ranked, key=lambda row: row.reward.mean if math.isfinite(row.reward.mean) else -math.inf)
    if most.sound:
        return ""
    return (
        f"{escape(most.name)} has more reward ({most.reward.mean:.2f}), but other metrics speak against it."
    )


def _claims(results: Results, summary: Summary) -> str:
    claims = judge_claims(results, summary)
    if not claims:
        return ""
    kinds = {True: "yes", False: "no", None: "open"}
    lines = "".join(
        f'<li class="{kinds[claim.holds]}">{escape(claim.text)}: <span class="answer">{escape(claim.answer)}</span></li>'
        for claim in claims
    )
    return f'<section><h2>Do the claims hold?</h2><ul class="claims">{lines}</ul></section>'


def _warnings(summary: Summary) -> str:
    if not summary.warnings:
        return '<section><h2>Warnings</h2><p class="note">None.</p></section>' if summary.rows else ""
    order = list(_KIND_WORDS)
    lines = "".join(
        f'<li class="{concern.kind}"><span class="kind">{_KIND_WORDS[concern.kind]}</span>{escape(concern.text)}</li>'
        for concern in sorted(summary.warnings, key=lambda concern: order.index(concern.kind))
    )
    return f'<section><h2>Warnings</h2><ul class="warnings">{lines}</ul></section>'


def _plots(pictures: Sequence[Picture]) -> str:
    blocks = []
    for picture in pictures:
        title, caption = _CAPTIONS[picture.name]
        blocks.append(
            f'<figure id="{picture.name}"><h3>{title}</h3><img alt="{escape(picture.alt)}" src="{picture.address}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return _section("Plots", f'<div class="plots">{"".join(blocks)}</div>' if blocks else "")


def _no_tasks(results: Results) -> str:
    measured = [
        seed.metrics.forgetting
        for method in results.methods
        for seed in method.seeds
        if seed.metrics.forgetting
    ]
    if any(found.tasks for found in measured):
        return ""
    return " reasoning-gym was not installed when this was measured, so there are no such questions here."


def _browser(summary: Summary, colours: dict[str, str]) -> str:
    """The sample browser's place and its data; the script does the rest."""
    methods = [row.method for row in summary.rows if row.finished and row.method.seeds[0].samples]
    if not methods:
        return ""
    methods.sort(key=lambda method: (method.name != BASE, method.name != OURS))  # then in rank
    samples: dict[str, dict[str, Any]] = {}
    for method in methods:
        for sample in method.seeds[0].samples:
            samples.setdefault(clean(sample.prompt), {}).setdefault(method.name, _sample(sample))
    data = {
        "methods": [{"name": clean(method.name), "colour": colours[method.name]} for method in methods],
        "prompts": [{"prompt": prompt, "samples": found} for prompt, found in samples.items()],
    }
    note = (
        '<p class="legend">One sampled completion of each held-out prompt, of each method&rsquo;s first seed. Colour: how much '
        'likelier training made the token (<span style="background:rgba(26,127,55,.4)">likelier</span>, '
        '<span style="background:rgba(207,34,46,.35)">less likely</span>; full colour at 2 nats); the number is the reward.</p>'
    )
    return (
        f'<section><h2>Samples</h2>{note}<div id="browser"></div><noscript>The samples need JavaScript; they are also in '
        f'{RESULTS_NAME}.</noscript><script type="application/json" id="samples">{json_for_script(data)}</script></section>'
    )


def _sample(sample: Sample) -> dict[str, Any]:
    fits = (
        len(sample.tokens) == len(sample.gains)
        and "".join(sample.tokens).strip() == sample.completion.strip()
    )
    return {
        "text": clean(sample.completion),
        "reward": _finite(sample.reward),
        "terms": {clean(name): _finite(value) for name, value in sample.terms.items()},
        # Tokens that do not spell the completion would show another text.
        "tokens": [clean(token) for token in sample.tokens] if fits else [],
        "gains": [_finite(gain) for gain in sample.gains] if fits else [],
    }


def _finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def _method(results: Results) -> str:
    """How it was measured, in words."""
    finished = [method for method in results.methods if method.seeds]
    if not finished:
        return ""
    prompts = len(finished[0].seeds[0].metrics.reward_sampled)
    seeds = ", ".join(f"{escape(method.name)} {len(method.seeds)}" for method in finished)
    return _section(
        "How this was measured",
        '<div class="method-prose">'
        f"<p>Every method was trained in a process of its own and measured by the same code: the same {prompts} held-out prompts, "
        "sampling settings, sampling seed and reward functions. Peers ran through the trainers of TRL and the adapters of "
        "PEFT as these are published; each was tried at every learning rate listed above, and its best is shown. Searching a "
        "learning rate is not counted in any time on this page.</p>"
        f"<p>Seeds: {seeds}. Intervals are 95 % bootstrap intervals over held-out prompts and seeds, drawn independently of each "
        "other; with one seed they say nothing about other seeds. Differences are paired by prompt. A level counts as reached at "
        "the first held-out evaluation at or above it; over several seeds the median is shown.</p>"
        "<p>KL is in nats a token, over the tokens that the method itself sampled. Exact: in each of these states the whole "
        "vocabulary is summed for policy and base model. Monte-Carlo: the mean log-probability gain of the same tokens. Bound: "
        "best-of-n has no distribution of its own; log n &minus; (n&minus;1)/n nats a completion is an upper bound. Surprise, "
        "diversity, compressed size and perplexities are not part of any reward unless a reward term of the recipe pays for "
        "them; those that are paid for are not used as witnesses. A method is called suspect when its reward rose while such "
        f"a metric got worse by more than {results.guards.independent_fall:.0%} of the base model&rsquo;s, or fewer than "
        f"{results.guards.diversity_floor:.0%} of the base model&rsquo;s distinct bigrams are left.</p></div>",
    )


def _settings(results: Results) -> str:
    parts = [f"<h2>Reproduce</h2><pre>{escape(results.command)}</pre>"]
    recipe = _recipe(results)
    options = {name: value for name, value in results.settings.items() if value is not recipe}
    named = {"comparison": options} if options else {}
    plain = {name: value for name, value in recipe.items() if not isinstance(value, dict | list)}
    named |= {"recipe": plain} if plain else {}
    groups = setting_groups(
        named | {n: v for n, v in recipe.items() if n not in plain} | {"guards": results.guards.model_dump()}
    )
    parts.append(f"<details><summary>All settings</summary>{groups}</details>" if groups else "")
    found = {"machine": results.machine, "versions": results.versions}
    shown = pairs(flatten({name: value for name, value in found.items() if value}))
    parts.append(f'<details><summary>Versions and machine</summary><div class="wide">{shown}</div></details>')
    return f"<section>{''.join(parts)}</section>"
