"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import yaml

from tea_rl.errors import TeaError
from tea_rl.evaluation.report_parts import escape, flatten, html_page, number, pairs, setting_groups
from tea_rl.evaluation.report_profile import profile_section
from tea_rl.training.files import atomic_write_text, disk_errors, read_jsonl
from tea_rl.training.plots import write_curves
from tea_rl.training.run_directory import (
    CURVES_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    PROFILE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    SAMPLES_NAME,
    has_run,
)

#: Evaluation metrics in the order of the table: key, what it is.
_EVAL_METRICS = (
    ("eval_reward", "Reward, sampled"),
    ("eval_reward_greedy", "Reward, greedy"),
    ("eval_kl", "KL to the base model (nats a token)"),
    ("eval_base_nll", "Surprise under the base model (nats a token)"),
    ("eval_distinct_2", "Distinct bigrams (share)"),
    ("eval_completion_length", "Completion length (tokens)"),
)
#: The same for offline runs.
_OFFLINE_METRICS = (
    ("eval_loss", "Cross-entropy (nats a token)"),
    ("eval_perplexity", "Perplexity"),
    ("eval_accuracy", "Accuracy of the likeliest token"),
    ("eval_reward_correlation", "Rank correlation of reward and gain over the base model"),
    ("eval_pair_accuracy", "Pairs whose chosen completion gained more"),
    ("eval_pair_accuracy_logp", "Pairs whose chosen completion is likelier"),
    ("eval_kl", "KL to the base model (nats a token)"),
)
#: What the page's headline shows: the first of these that was measured.
_HEADLINES = (
    ("eval_reward", "Held-out reward"),
    ("eval_pair_accuracy_logp", "Held-out pair accuracy"),
    ("eval_reward_correlation", "Held-out rank correlation of reward and gain"),
    ("eval_loss", "Held-out cross-entropy"),
)
#: Longest prompt among the samples, in characters.
_PROMPT_SHOWN = 240
_TRAIN_METRICS = (
    ("reward", "Reward of the batch"),
    ("loss", "Loss"),
    ("kl", "KL to the base model (nats a token)"),
    ("entropy", "Entropy (nats a token)"),
    ("disagreement", "Disagreement of the members"),
    ("completion_length", "Completion length (tokens)"),
    ("tokens_per_second", "Tokens a second"),
    ("seconds", "Seconds a step"),
)


def write_report(run_path: str | Path) -> Path:
    """Write ``report.html`` of a run from what its folder holds, finished or not.

    Shows the held-out reward from and to, the curves, base and trained completions side by side, metrics, settings and
    versions. Everything a model wrote is escaped.

    Returns:
        path of the page.

    Raises:
        TeaError: if the folder holds no run, or the disk refuses.
    """
    run_path = Path(run_path)
    if not has_run(run_path):
        raise TeaError(
            f"expected the folder of a run, but {run_path} holds no {RECIPE_NAME}; give one made by `tea-rl train`"
        )
    metrics, samples = read_jsonl(run_path / METRICS_NAME), read_jsonl(run_path / SAMPLES_NAME)
    recipe, manifest = _read(run_path / RECIPE_NAME), _read(run_path / MANIFEST_NAME)
    curves = run_path / CURVES_NAME
    write_curves(metrics, curves)
    picture = base64.b64encode(curves.read_bytes()).decode("ascii")
    name = str(recipe.get("name") or run_path.resolve().name)
    parts = [
        _header(name, recipe, metrics, manifest),
        f'<section><h2>Learning curves</h2><img alt="Learning curves" src="data:image/png;base64,{picture}"></section>',
        _samples(samples),
        _metrics(metrics),
        profile_section(_read(run_path / PROFILE_NAME)),
        _settings(recipe),
        _versions(manifest),
    ]
    page = html_page(name, parts)
    with disk_errors(f"write {run_path / REPORT_NAME}"):
        atomic_write_text(run_path / REPORT_NAME, page)
    return run_path / REPORT_NAME


def _read(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of the run; empty if it is missing or not a mapping."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise TeaError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it") from error
    return value if isinstance(value, dict) else {}


def _header(
    name: str, recipe: dict[str, Any], metrics: list[dict[str, Any]], manifest: dict[str, Any]
) -> str:
    evaluations, steps = _evaluations(metrics), _steps(metrics)
    model = recipe.get("model", {}).get("name_or_path") or manifest.get("base_model", "")
    facts = [escape(str(model))] if model else []
    if steps:
        facts += [f"{len(steps)} steps", _duration(sum(row.get("seconds") or 0 for row in steps))]
    if manifest.get("trainable_parameters"):
        facts.append(f"{manifest['trainable_parameters'] / 1e6:.1f} M trained parameters")
    headline = '<p class="headline none">No held-out evaluation</p>'
    if evaluations:
        key, label = next(pair for pair in _HEADLINES if pair[0] in evaluations[0])
        first, last = evaluations[0][key], evaluations[-1].get(key)
        begin = (
            f'<span class="from">{number(first)}</span><span class="arrow">&rarr;</span>'
            if len(evaluations) > 1
            else ""
        )
        headline = f'<p class="headline"><span class="label">{label}</span>{begin}<span class="to">{number(last)}</span></p>'
    description = (
        f'<p class="description">{escape(recipe["description"])}</p>' if recipe.get("description") else ""
    )
    return f'<header><h1>{escape(name)}</h1>{description}{headline}<p class="facts">{" &middot; ".join(facts)}</p></header>'


def _evaluations(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in metrics if "eval_reward" in row or "eval_loss" in row]


def _steps(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in metrics if "reward" in row or "loss" in row]


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    steps = sorted({row["step"] for row in samples})
    blocks = []
    for step in reversed(steps):
        rows = "".join(_sample(row) for row in samples if row["step"] == step)
        table = (
            '<table class="samples"><thead><tr><th>Prompt</th><th>Base</th><th>Trained</th></tr></thead>'
            f"<tbody>{rows}</tbody></table>"
        )
        # The last evaluation is open; step 0, where both sides are the base model, has nothing to compare.
        if step == steps[-1]:
            blocks.append(f"<p>Held-out prompts after step {step}.</p>{table}")
        elif step > 0:
            blocks.append(f"<details><summary>After step {step}</summary>{table}</details>")
    return f"<section><h2>Samples</h2>{''.join(blocks)}</section>"


def _sample(row: dict[str, Any]) -> str:
    base, trained = row.get("base_reward"), row.get("trained_reward")
    better = isinstance(base, int | float) and isinstance(trained, int | float) and trained > base
    return (
        f'<tr><td class="prompt">{escape(_asked(str(row.get("prompt", "")).strip()))}</td>'
        f"<td>{_badge(base, False)}{escape(str(row.get('base', '')).strip())}</td>"
        f"<td>{_badge(trained, better)}{escape(str(row.get('trained', '')).strip())}</td></tr>"
    )


def _asked(prompt: str) -> str:
    """What a prompt asks: of a long one, such as one behind worked examples, its last paragraph or last words."""
    if len(prompt) <= _PROMPT_SHOWN:
        return prompt
    last = prompt.rpartition("\n\n")[2].strip()
    if not 0 < len(last) <= _PROMPT_SHOWN:
        _, line, rest = prompt[-_PROMPT_SHOWN:].partition("\n")
        last = rest if line and rest else prompt[-_PROMPT_SHOWN:]
    return f"...\n{last}"


def _badge(reward: Any, better: bool) -> str:
    known = isinstance(reward, int | float) and math.isfinite(reward)
    text = f"{reward:.2f}" if known else number(reward)
    return f'<span class="badge{" better" if better else ""}">{text}</span>'


def _metrics(metrics: list[dict[str, Any]]) -> str:
    evaluations, steps = _evaluations(metrics), _steps(metrics)
    offline = bool(evaluations) and "eval_loss" in evaluations[0]
    tables = []
    for rows, known, title in (
        (evaluations, _OFFLINE_METRICS if offline else _EVAL_METRICS, "Held-out"),
        (steps, _TRAIN_METRICS, "Training"),
    ):
        if not rows:
            continue
        prefix = "eval_reward/" if rows is evaluations else "reward/"
        terms = sorted({key for row in rows for key in row if key.startswith(prefix)})
        named = [(key, f"Reward term: {key.removeprefix(prefix)}") for key in terms]
        keys = [*known[:1], *named, *known[1:]] if len(terms) > 1 else list(known)
        body = "".join(
            f"<tr><td>{escape(label)}</td>{_first_last(rows, key)}</tr>"
            for key, label in keys
            if any(key in row for row in rows)
        )
        first = "Base model" if rows[0]["step"] == 0 else f"Step {rows[0]['step']}"
        tables.append(
            f"<table><thead><tr><th>{title}</th><th>{first}</th><th>Step {rows[-1]['step']}</th><th>Change</th></tr>"
            f"</thead><tbody>{body}</tbody></table>"
        )
    skipped = steps[-1].get("skipped_steps", 0) if steps else 0
    note = f"<p>{skipped} updates were skipped because they were not finite.</p>" if skipped else ""
    return f"<section><h2>Metrics</h2>{note}{''.join(tables)}</section>" if tables else ""


def _first_last(rows: list[dict[str, Any]], key: str) -> str:
    first, last = rows[0].get(key), rows[-1].get(key)
    change = ""
    if isinstance(first, int | float) and isinstance(last, int | float) and math.isfinite(last - first):
        change = ("+" if last >= first else "") + number(last - first)
    return "".join(f'<td class="number">{text}</td>' for text in (number(first), number(last), change))


def _settings(recipe: dict[str, Any]) -> str:
    groups = setting_groups({n: value for n, value in recipe.items() if n not in ("name", "description")})
    return f"<section><h2>Settings</h2>{groups}</section>" if groups else ""


def _versions(manifest: dict[str, Any]) -> str:
    return (
        f'<section><h2>Versions</h2><div class="wide">{pairs(flatten(manifest))}</div></section>'
        if manifest
        else ""
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s of training" if seconds < 120 else f"{seconds / 60:.1f} min of training"
