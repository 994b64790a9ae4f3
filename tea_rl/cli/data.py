"""``tea-rl data``: look at a labelled dataset before training on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tea_rl.cli.common import JsonOption, note, print_json, quiet_transformers
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.data.labelled import LabelledData
    from tea_rl.data.summary import DataSummary, Lengths
    from tea_rl.model_source import ModelSource

app = typer.Typer(help="Look at labelled data before training on it.", no_args_is_help=True)

_SHOWN_PROBLEMS = 10
_BAR_WIDTH = 40


@app.callback()
def _group() -> None:
    """Look at labelled data before training on it."""


@app.command("check")
def check(
    file: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .json, .csv, .parquet or .txt file, a datasets folder, a Hub id or tea_rl/NAME."
        ),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="OURS=THEIRS",
            help="A column that is called otherwise in the file, such as --columns reward=stars. Repeatable.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of a dataset; train by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model whose tokenizer counts: Hub id, folder or .gguf."),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="plain or chat: how prompts that are text would be rendered.")
    ] = "plain",
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Count rows longer than this; by default the model's context."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a labelled dataset: format, rewards, lengths, and every row that is wrong; exits with 2 if one is.

    Example: [bold]tea-rl data check ratings.jsonl --columns reward=stars[/bold]
    """
    names = _parse_columns(columns or [])
    if format not in ("plain", "chat"):
        raise TeaError(f'--format takes plain or chat; got "{format}"')
    if split is not None and Path(file).is_file():
        raise TeaError(f"--split is for a datasets folder or a Hub id; got the file {file}; leave it out")
    from tea_rl.data.labelled import scan_labelled
    from tea_rl.data.summary import summarise

    data, problems = scan_labelled(file, {"split": split} if split else {}, names, "FILE", "--columns")
    summary = summarise(data)
    if data.rows:
        summary.lengths = _lengths(data, model, "chat" if format == "chat" else "plain", max_length)
    if as_json:
        bad = {"num_bad_rows": len(problems), "bad_rows": problems[:_SHOWN_PROBLEMS]}
        print_json({**asdict(summary), **bad})
    else:
        _print(summary, problems)
    if problems:
        raise TeaError(f"{len(problems)} bad row(s) in {file}; the first: {problems[0]}")


def _parse_columns(pairs: list[str]) -> dict[str, str]:
    names = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise TeaError(f'--columns takes OURS=THEIRS, such as reward=stars; got "{pair}"')
        names[ours.strip()] = theirs.strip()
    return names


def _lengths(
    data: LabelledData, model: str | None, format: Literal["plain", "chat"], max_length: int | None
) -> Lengths | None:
    """Token lengths; none where no model was asked for and the default one is not there."""
    quiet_transformers()
    from tea_rl.backbone import load_tokenizer
    from tea_rl.data.summary import describe_lengths
    from tea_rl.model_source import find_model
    from tea_rl.packaged import DEFAULT_MODEL
    from tea_rl.recipe import DataConfig

    try:
        source = find_model(model or DEFAULT_MODEL, notify=note)
        tokenizer = load_tokenizer(source)
    except TeaError as error:
        if model is not None:
            raise
        note(f"no token lengths: {error}")
        return None
    config = DataConfig(dataset=data.source, format=format)
    return describe_lengths(data, config, tokenizer, max_length or _context(source), model or DEFAULT_MODEL)


def _context(source: ModelSource) -> int | None:
    """Tokens in the model's context, as its configuration states them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.path, **source.arguments())
    return getattr(config, "max_position_embeddings", None)


def _print(summary: DataSummary, problems: list[str]) -> None:
    typer.echo(f"format:   {summary.format}")
    pairs = f", {summary.pairs} pairs" if summary.pairs else ""
    typer.echo(
        f"rows:     {summary.rows} good, {len(problems)} bad; {summary.prompts} distinct prompts or texts{pairs}"
    )
    if summary.labels:
        typer.echo("labels:   " + ", ".join(f"{count} {name}" for name, count in summary.labels.items()))
    if summary.splits:
        counts = ", ".join(f"{count} {name}" for name, count in summary.splits.items())
        typer.echo(f"split:    {counts} (the column split decides what is held out)")
    if summary.lengths is not None:
        _print_lengths(summary.lengths)
    if summary.rewards is not None:
        rewards = summary.rewards
        typer.echo(
            f"rewards:  {rewards.min:g} to {rewards.max:g}, mean {rewards.mean:.3g}, deviation {rewards.std:.3g}, "
            f"{rewards.distinct} distinct"
        )
        _print_histogram(rewards.histogram)
    for warning in summary.warnings:
        typer.echo(f"warning:  {warning}")
    for problem in problems[:_SHOWN_PROBLEMS]:
        typer.echo(f"bad row:  {' '.join(problem.split())}")
    if len(problems) > _SHOWN_PROBLEMS:
        typer.echo(f"          and {len(problems) - _SHOWN_PROBLEMS} more")


def _print_lengths(lengths: Lengths) -> None:
    typer.echo(
        f"tokens:   median {lengths.median}, 95 % up to {lengths.p95}, longest {lengths.max}; "
        f"{lengths.completion_tokens} to learn ({lengths.model})"
    )
    if lengths.truncated or lengths.dropped:
        typer.echo(
            f"too long: {lengths.truncated} rows would be cut at {lengths.max_length} tokens, {lengths.dropped} left out "
            "(no room for a completion)"
        )
    elif lengths.max_length is not None:
        typer.echo(f"too long: none at {lengths.max_length} tokens")


def _print_histogram(bars: list[dict[str, float]]) -> None:
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right")
    tallest = max(bar["rows"] for bar in bars)
    for bar in bars:
        low, high = bar["from"], bar["to"]
        label = f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
        table.add_row(f"          {label}", Bar(tallest, 0, bar["rows"], width=_BAR_WIDTH), str(bar["rows"]))
    Console(highlight=False).print(table)
