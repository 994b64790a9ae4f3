"""``tea-rl inspect``: browse a store's rows, tokens and episodes, or a run's samples or held-out figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import JsonOption, note, print_json
from tea_rl.cli.transcript import episode_title, printable_lines, transcript_lines

if TYPE_CHECKING:
    from tea_rl.states.store import StateStore

#: Characters of an observation in a list, its last ones: what was asked stands there.
_OBSERVATION = 50


def inspect(
    path: Annotated[Path, typer.Argument(metavar="STORE|RUN", help="A state store or a run directory.")],
    row: Annotated[int | None, typer.Option("--row", min=0, help="Show this row in full.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most rows to list.")] = 20,
    start: Annotated[int, typer.Option("--start", min=0, help="First row to list.")] = 0,
    episode: Annotated[
        int | None, typer.Option("--episode", min=0, help="Show this episode of a store, turn by turn.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", help="A saved head whose log-probabilities to set beside.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Browse rows, rewards and token-level log-probabilities of a store, or the samples (offline: held-out figures) of a run.

    What was played in an environment is shown turn by turn: of a run with --row, of a store with --episode.

    Example: [bold]tea-rl inspect stores/quickstart --row 3[/bold]
    """
    from tea_rl.errors import TeaError
    from tea_rl.training.run_directory import has_run

    if has_run(path):
        if head is not None:
            raise TeaError(
                f"--head is for stores, but {path} is a run; leave it out, or give {_rows_of(path)}"
            )
        if episode is not None:
            raise TeaError(f"--episode is for stores, but {path} is a run; its samples are shown by --row")
        _inspect_run(path, row, start, limit, as_json)
        return
    from tea_rl.states.browse import load_head_for
    from tea_rl.states.store import StateStore

    # Looking at some rows should not read all of them: files are compared with their digests as they are read.
    store = StateStore.open(path, verify=False)
    tea = None if head is None else load_head_for(store, head)
    if episode is not None:
        _inspect_episode(store, episode, as_json)
        return
    if row is not None:
        _inspect_row(store, row, tea, as_json)
        return
    _inspect_rows(store, start, limit, tea, as_json)


def _inspect_rows(store: StateStore, start: int, limit: int, tea: Any, as_json: bool) -> None:
    """A list of rows; of episodes it shows the turns."""
    from tea_rl.errors import TeaError
    from tea_rl.states.browse import row_summaries, store_summary

    if start >= len(store):
        raise TeaError(
            f"{store.path} has rows 0 to {len(store) - 1}, got --start {start}; choose one of them"
        )
    rows = row_summaries(store, range(start, min(start + limit, len(store))), tea)
    if as_json:
        print_json({"store": store_summary(store), "rows": rows})
        return
    _print_summary(store_summary(store))
    played = "episode" in rows[0]["columns"]
    if played:
        rows = [_turn_summary(item) for item in rows]
    gain = ["gain"] if tea is not None else []
    if played:  # the narrow figures only: the texts are what one looks for
        titles = ["row", "episode", "turn", "reward", "return", *gain, "observation", "completion"]
    else:
        titles = ["row", "reward", "tokens", "base_logp", *gain, "prompt", "completion"]
    _print_table(titles, [[_cell(item[title]) for title in titles] for item in rows])
    if start + limit < len(store):
        note(
            f"{len(store) - start - limit} more rows; --start {start + limit} goes on, --row N shows one in full"
        )
    if played:
        note("--episode N shows one turn by turn")


def _turn_summary(item: dict[str, Any]) -> dict[str, Any]:
    """A row of an episode: what was said last stands for the conversation before it, the return for the reward."""
    columns = item["columns"]
    said = " ".join(columns["observation"].split("\n"))
    return {
        **{name: value for name, value in item.items() if name not in ("prompt", "reward", "columns")},
        "return": item["reward"],
        **columns,
        "reward": columns["step_reward"],
        "observation": said if len(said) <= _OBSERVATION else "..." + said[3 - _OBSERVATION :],
        "completion": item["completion"] + (" (invalid)" if columns["invalid"] else ""),
    }


def _inspect_episode(store: StateStore, number: int, as_json: bool) -> None:
    """An episode of a store, turn by turn."""
    from tea_rl.errors import TeaError

    turns, others = [], set()
    for row, text in enumerate(store.texts()):
        columns = text["columns"]
        if columns.get("episode") == number:
            value = float(store.rewards[row])
            known = {
                "row": row,
                "completion": text["completion"],
                "return": None if value != value else value,
            }
            turns.append({**columns, **known, "reward": columns["step_reward"]})
        elif "episode" in columns:
            others.add(columns["episode"])
    if not turns:
        has = (
            f"has {len(others)} of the episodes 0 to {max(others)}; those that failed left no rows"
            if others
            else "holds no episodes"
        )
        raise TeaError(
            f"expected an episode of {store.path}, which {has}, got --episode {number}; choose another"
        )
    if as_json:
        print_json({"episode": number, "start": turns[0]["start"], "turns": turns})
        return
    name = f"episode {number} (start {turns[0]['start']}, rows {turns[0]['row']} to {turns[-1]['row']})"
    typer.echo(episode_title(name, sum(turn["reward"] for turn in turns), len(turns)))
    typer.echo("\n".join(transcript_lines(turns, turns[-1])))


def _inspect_row(store: StateStore, row: int, head: Any, as_json: bool) -> None:
    from tea_rl.states.browse import load_tokenizer, row_summaries, token_rows

    tokens = token_rows(store, row, head, load_tokenizer(store))
    (summary,) = row_summaries(store, [row], head)
    if as_json:
        print_json({**summary, "per_token": tokens})
        return
    if "episode" in summary["columns"]:
        told = {"observation": summary["columns"]["observation"], "completion": summary["completion"]}
        summary = {k: v for k, v in (_turn_summary(summary) | told).items() if k != "step_reward"}
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

    what, items = _run_items(path)
    wanted = start if row is None else row
    if wanted >= len(items):
        raise TeaError(f"{path} has {what} 0 to {len(items) - 1}, got {wanted}; choose one of them")
    rows = [{"row": number, **item} for number, item in enumerate(items)]
    shown = rows[start : start + limit] if row is None else [rows[row]]
    if as_json:
        print_json(shown)
    elif row is not None:
        _print_sample(shown[0])
    else:
        titles = list(dict.fromkeys(name for item in shown for name in item if not name.endswith("_episode")))
        _print_table(titles, [[_cell(item.get(title)) for title in titles] for item in shown])
        if start + limit < len(rows):
            note(f"{len(rows) - start - limit} more {what}; --start {start + limit} goes on")
        if what == "samples":
            note("--row N shows one in full")
    if what == "evaluations":
        note(f"{path} has no samples, so these are its held-out figures; look at rows with {_rows_of(path)}")


def _print_sample(sample: dict[str, Any]) -> None:
    """Everything of a sample; episodes turn by turn, which say it all."""
    sides = {name: sample[f"{name}_episode"] for name in ("base", "trained") if f"{name}_episode" in sample}
    told = {"prompt", *(name + end for name in sides for end in ("", "_reward", "_episode"))}
    for name, value in sample.items():
        if sides and name in told:
            continue
        if isinstance(value, str) and "\n" in value.strip("\n"):
            typer.echo(f"{name}:\n" + "\n".join(f"  | {line}" for line in printable_lines(value)))
        else:
            typer.echo(f"{name + ':':16} {_cell(value, 4000)}")
    for name, played in sides.items():
        typer.echo("\n" + episode_title(name, sample[f"{name}_reward"], len(played["turns"])))
        typer.echo("\n".join(transcript_lines(played["turns"], played)))


def _run_items(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """What there is to look at in a run, and its name.

    Raises:
        TeaError: if there is nothing yet.
    """
    from tea_rl.errors import TeaError
    from tea_rl.training.files import read_jsonl
    from tea_rl.training.run_directory import METRICS_NAME, SAMPLES_NAME

    if samples := read_jsonl(path / SAMPLES_NAME):
        return "samples", samples
    metrics = read_jsonl(path / METRICS_NAME)
    figures = [
        {
            name.removeprefix("eval_"): value
            for name, value in row.items()
            if name == "step" or name.startswith("eval_")
        }
        for row in metrics
    ]
    if evaluations := [row for row in figures if len(row) > 1]:
        return "evaluations", evaluations
    steps = max((row.get("step", 0) for row in metrics), default=0)
    raise TeaError(
        f"expected samples or held-out figures in the run {path}, but it has {steps} steps and neither; they come with "
        f"evaluations (train.eval_steps, held-out data); see {path / METRICS_NAME}, or {_rows_of(path)}"
    )


def _rows_of(path: Path) -> str:
    """The command that shows the rows a run learns from, as far as the run tells."""
    store = path / "store"
    return f"tea-rl inspect {store if store.is_dir() else 'STORE'} --head {path / 'head'}"


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
        words = title in ("prompt", "observation", "completion", "text", "base", "trained")
        table.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _cell(value: Any, limit: int = 60) -> str:
    """A value in one line; the end of a long text is left out."""
    if value is None or value != value:  # NaN: nothing was measured
        return "-"
    if isinstance(value, float):
        return f"{value:+.3f}"
    text = repr(value)[1:-1] if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
