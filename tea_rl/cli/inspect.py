"""``tea-rl inspect``: browse a store's rows and tokens, or a run's samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import JsonOption, note, print_json

if TYPE_CHECKING:
    from tea_rl.states.store import StateStore


def inspect(
    path: Annotated[Path, typer.Argument(metavar="STORE|RUN", help="A state store or a run directory.")],
    row: Annotated[int | None, typer.Option("--row", min=0, help="Show this row in full.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most rows to list.")] = 20,
    start: Annotated[int, typer.Option("--start", min=0, help="First row to list.")] = 0,
    head: Annotated[
        Path | None, typer.Option("--head", help="A saved head whose log-probabilities to set beside.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Browse rows, rewards and token-level log-probabilities of a store, or the samples of a run.

    Example: [bold]tea-rl inspect stores/quickstart --row 3[/bold]
    """
    from tea_rl.errors import TeaError
    from tea_rl.training.run_directory import has_run

    if has_run(path):
        if head is not None:
            raise TeaError(f"--head is for stores, but {path} is a run; leave it out")
        _inspect_run(path, row, start, limit, as_json)
        return
    from tea_rl.states.browse import load_head_for, row_summaries, store_summary
    from tea_rl.states.store import StateStore

    # Looking at some rows should not read all of them; training compares the digests.
    store = StateStore.open(path, verify=False)
    tea = None if head is None else load_head_for(store, head)
    if row is not None:
        _inspect_row(store, row, tea, as_json)
        return
    if start >= len(store):
        raise TeaError(f"{path} has rows 0 to {len(store) - 1}, got --start {start}; choose one of them")
    rows = row_summaries(store, range(start, min(start + limit, len(store))), tea)
    if as_json:
        print_json({"store": store_summary(store), "rows": rows})
        return
    _print_summary(store_summary(store))
    titles = [
        "row",
        "reward",
        "tokens",
        "base_logp",
        *(["gain"] if tea is not None else []),
        "prompt",
        "completion",
    ]
    _print_table(titles, [[_cell(item[title]) for title in titles] for item in rows])
    if start + limit < len(store):
        note(
            f"{len(store) - start - limit} more rows; --start {start + limit} goes on, --row N shows one in full"
        )


def _inspect_row(store: StateStore, row: int, head: Any, as_json: bool) -> None:
    from tea_rl.states.browse import load_tokenizer, row_summaries, token_rows

    tokens = token_rows(store, row, head, load_tokenizer(store))
    (summary,) = row_summaries(store, [row], head)
    if as_json:
        print_json({**summary, "per_token": tokens})
        return
    for name, value in summary.items():
        if value not in (None, {}, ""):
            typer.echo(f"{name + ':':12} {_cell(value, 2000)}")
    titles = ["position", "token", "text", "rank", "base_logp"]
    titles += ["logp"] if store.kind == "rollout" else []
    titles += ["head_logp", "gain"] if head is not None else []
    _print_table(
        titles,
        [["tail" if t == "rank" and item[t] is None else _cell(item[t]) for t in titles] for item in tokens],
    )


def _inspect_run(path: Path, row: int | None, start: int, limit: int, as_json: bool) -> None:
    from tea_rl.errors import TeaError
    from tea_rl.training.files import read_jsonl
    from tea_rl.training.run_directory import SAMPLES_NAME

    samples = read_jsonl(path / SAMPLES_NAME)
    if not samples:
        raise TeaError(f"the run {path} has no samples yet; they come with its evaluations")
    wanted = start if row is None else row
    if wanted >= len(samples):
        raise TeaError(f"{path} has samples 0 to {len(samples) - 1}, got {wanted}; choose one of them")
    rows = [{"row": number, **sample} for number, sample in enumerate(samples)]
    shown = rows[start : start + limit] if row is None else [rows[row]]
    if as_json:
        print_json(shown)
    elif row is not None:
        for name, value in shown[0].items():
            typer.echo(f"{name + ':':16} {_cell(value, 4000)}")
    else:
        titles = list(dict.fromkeys(name for item in shown for name in item))
        _print_table(titles, [[_cell(item.get(title)) for title in titles] for item in shown])
        if start + limit < len(rows):
            note(f"{len(rows) - start - limit} more samples; --start {start + limit} goes on")


def _print_summary(summary: dict[str, Any]) -> None:
    mean = summary["mean_reward"]
    typer.echo(
        f"{summary['kind']} store, {summary['rows']} rows ({summary['groups']} prompts), {summary['tokens']} tokens, "
        f"{summary['bytes'] / 1e6:.0f} MB in {summary['shards']} shards"
        + (
            f", mean reward {mean:+.3f} over {summary['rewards']} rows"
            if mean is not None
            else ", no rewards"
        )
    )
    keys = summary["keys"]
    typer.echo(
        f"made with {keys['base_model_name_or_path']}, {keys['dtype']}, temperature {keys['temperature']:g}"
    )


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for title in titles:
        words = title in ("prompt", "completion", "text", "base", "trained")
        table.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _cell(value: Any, limit: int = 60) -> str:
    """A value in one line; the end of a long text is left out."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:+.3f}"
    text = repr(value)[1:-1] if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
