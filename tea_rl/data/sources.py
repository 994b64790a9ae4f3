"""Rows of prompts from lists, files, ``datasets`` and reasoning-gym generators."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tea_rl.errors import TeaError, did_you_mean

_FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DATASET_KWARGS = ("name", "split", "data_dir", "revision")
_GENERATORS = "reasoning_gym/"


@dataclass(frozen=True)
class Row:
    """A prompt as its source gives it: text or messages, further columns, and where it stands (for errors)."""

    prompt: str | list[dict[str, str]]
    place: str
    columns: dict[str, Any] = field(default_factory=dict)


def read_rows(
    source: str | list[str], kwargs: Mapping[str, Any], size: int, seed: int, key: str = "data.prompts"
) -> list[Row]:
    """Read every row of a source.

    Args:
        source: inline prompts, a file, a ``datasets`` folder or Hub id, or ``reasoning_gym/NAME``.
        kwargs: settings of a generator or dataset.
        size, seed: for generators.
        key: the recipe's key that gave the source, for errors.

    Raises:
        TeaError: if there is no such source, it holds no prompt, or a row is malformed (named by file and row).
    """
    if isinstance(source, str) and source.startswith(_GENERATORS):
        rows = _read_generator(source.removeprefix(_GENERATORS), kwargs, size, seed)
    elif isinstance(source, list):
        _refuse_kwargs(kwargs, "a list of prompts")
        rows = [Row(text, f"{key}.{index}") for index, text in enumerate(source)]
    elif Path(source).suffix.lower() == ".txt":
        _refuse_kwargs(kwargs, "a text file")
        rows = _read_text(Path(source))
    elif Path(source).suffix.lower() in _FILE_READERS:
        _refuse_kwargs(kwargs, "a file")
        rows = _read_table(Path(source))
    else:
        rows = _read_dataset(source, kwargs, key)
    if not rows:
        raise TeaError(f"{source}: expected at least one prompt, got an empty source; add prompts.")
    return rows


def _refuse_kwargs(kwargs: Mapping[str, Any], source: str) -> None:
    if kwargs:
        raise TeaError(
            f"data.kwargs is for datasets and reasoning_gym generators, got {', '.join(map(str, kwargs))} for {source}; "
            "remove it."
        )


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise TeaError(f"expected a file of prompts, got the folder {path}; name a file in it.")
    if not path.is_file():
        nearby = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TeaError(
            f"the prompt file {path} does not exist; check data.prompts.{did_you_mean(path.name, nearby)}"
        )
    try:
        if path.stat().st_size == 0:
            raise TeaError(f"{path}: expected at least one prompt, got an empty file; add prompts.")
        with path.open("rb"):
            pass
    except OSError as error:
        raise TeaError(f"{path}: cannot be read: {error.strerror}.") from None


def _read_text(path: Path) -> list[Row]:
    _check_file(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TeaError(
            f"{path}: expected UTF-8 text, got other bytes at byte {error.start}; save it as UTF-8."
        ) from None
    # White space around a prompt is a slip of the editor that would change its tokens.
    return [
        Row(line.strip(), f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """Import ``datasets`` and keep its progress bars and log lines off the terminal for a moment."""
    import datasets

    shown, verbosity = datasets.utils.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.utils.enable_progress_bars()


def _read_table(path: Path) -> list[Row]:
    _check_file(path)
    with _quiet_datasets() as datasets:
        try:
            table = datasets.load_dataset(
                _FILE_READERS[path.suffix.lower()], data_files=str(path), split="train"
            )
        except Exception as error:  # the readers raise whatever their parsers raise
            raise TeaError(_bad_table(path, error)) from error
        return _rows_of(table, table.column_names, str(path))


def _bad_table(path: Path, error: BaseException) -> str:
    """Say where a file is broken: the readers name neither file nor line."""
    if path.suffix.lower() == ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as decode_error:
            return f"{path}: expected UTF-8 text, got other bytes at byte {decode_error.start}; save it as UTF-8."
        if not any(line.strip() for line in lines):
            return f"{path}: expected at least one prompt, got an empty file; add prompts."
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line) if line.strip() else {}
            except ValueError as bad_json:
                return f"{path} line {number}: expected a JSON object, got invalid JSON ({bad_json}); mend the line."
            if not isinstance(value, dict):
                return f"{path} line {number}: expected a JSON object, got {type(value).__name__}; mend the line."
    if path.suffix.lower() == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as bad_json:
            return f"{path}: expected a JSON list of objects, got invalid JSON ({bad_json}); mend it."
    if path.suffix.lower() == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream)
                width = len(next(reader, []))
                for cells in reader:
                    if len(cells) > width:
                        found = f"{path} line {reader.line_num}: expected {width} columns, got {len(cells)}"
                        return f"{found}; put text that holds commas in double quotes."
        except (csv.Error, UnicodeDecodeError) as bad_csv:
            return f"{path}: expected UTF-8 CSV, got {' '.join(str(bad_csv).split())}."
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = " ".join(str(root).split())[:200].rstrip(".")
    return f"{path}: expected {path.suffix[1:]} rows with the same columns, got: {reason}."


def _read_dataset(source: str, kwargs: Mapping[str, Any], key: str) -> list[Row]:
    """Read a folder saved by ``datasets``, a folder of data files, or a Hub dataset."""
    for name in kwargs:
        if name not in _DATASET_KWARGS:
            hint = did_you_mean(name, _DATASET_KWARGS)
            raise TeaError(f'data.kwargs: a dataset takes {", ".join(_DATASET_KWARGS)}; got "{name}".{hint}')
    path = Path(source)
    local = path.exists()
    if (
        local
        and not path.is_dir()
        or not local
        and (path.is_absolute() or path.suffix.lower() in (".tsv", ".yaml", ".py"))
    ):
        if local:
            endings = ", ".join([".txt", *_FILE_READERS])
            raise TeaError(f"{key}: expected a file ending in {endings}, got {source}; rename or convert it.")
        raise TeaError(f"{key}: {source} does not exist; check the path.")
    with _quiet_datasets() as datasets:
        try:
            saved = local and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
            if saved:
                table = datasets.load_from_disk(source)
                if isinstance(table, datasets.DatasetDict):
                    table = table[_pick_split(kwargs.get("split", "train"), table, source)]
            else:
                table = datasets.load_dataset(source, **{"split": "train", **kwargs})
        except TeaError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            what = (
                "a folder of data files"
                if local
                else "a prompt file, a datasets folder or a Hub dataset that can be reached"
            )
            raise TeaError(
                f'{key}: expected {what}, got "{source}" ({type(error).__name__}: {reason}).'
            ) from error
        return _rows_of(table, table.column_names, source)


def _pick_split(split: str, table: Mapping[str, Any], source: str) -> str:
    if split not in table:
        raise TeaError(
            f'{source}: no split "{split}"; it has {", ".join(table)}: set data.kwargs {{split: ...}}.'
        )
    return split


def _rows_of(table: Iterable[Mapping[str, Any]], columns: list[str], source: str) -> list[Row]:
    if "prompts" in columns or "completions" in columns:
        raise TeaError(
            f'{source}: a column "prompts" or "completions" would hide what rewards are given under that name; rename it.'
        )
    if "prompt" not in columns:
        close = difflib.get_close_matches("prompt", columns, n=1)
        mend = f'rename "{close[0]}"' if close else "rename the column that holds the prompts"
        raise TeaError(f'{source}: expected a column "prompt", got {", ".join(columns) or "none"}; {mend}.')
    rows = []
    for number, entry in enumerate(table, 1):
        place = f"{source} row {number}"
        others = {name: value for name, value in entry.items() if name != "prompt"}
        rows.append(Row(_check_prompt(entry["prompt"], place), place, others))
    return rows


def _check_prompt(value: Any, place: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        if not value.strip():
            raise TeaError(f"{place}: expected a prompt, got blank text; fill or remove the row.")
        return value
    if not isinstance(value, list):
        got = "nothing" if value is None else f"{type(value).__name__} {value!r:.50}"
        raise TeaError(f'{place}: expected "prompt" as text or a list of messages, got {got}.')
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise TeaError(
                f'{place}: expected messages {{"role": ..., "content": text}}, got {message!r:.80}.'
            )
        messages.append({"role": role, "content": content})
    if not messages or messages[-1]["role"] == "assistant":
        got = "an assistant's turn at its end" if messages else "none"
        raise TeaError(
            f"{place}: expected messages that end with the user's turn, got {got}; remove it or add a question."
        )
    return messages


def _read_generator(name: str, kwargs: Mapping[str, Any], size: int, seed: int) -> list[Row]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise TeaError('reasoning_gym prompts need a package: pip install "tea-rl[reasoning]".') from None
    if name not in DATASETS:
        raise TeaError(
            f'reasoning_gym has no generator "{name}".{did_you_mean(name, DATASETS)} '
            f"Choose one of its {len(DATASETS)}, such as chain_sum."
        )
    settings = [entry.name for entry in fields(DATASETS[name][1]) if entry.name not in ("seed", "size")]
    for key in kwargs:
        if key not in settings:
            own = (
                "It is set by data.size or data.split_seed."
                if key in ("seed", "size")
                else f"It has: {', '.join(settings)}."
            )
            hint = did_you_mean(key, settings) or " " + own
            raise TeaError(f'data.kwargs: reasoning_gym/{name} has no setting "{key}".{hint}')
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **kwargs)
        entries = [dataset[index] for index in range(size)]
    except Exception as error:  # generators check their settings with assert, or not at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TeaError(
            f"data.kwargs: reasoning_gym/{name} refuses these settings: {reason}; got {dict(kwargs)}."
        ) from error
    return [
        Row(
            entry["question"],
            f"reasoning_gym/{name} row {index}",
            {"answer": entry["answer"], "metadata": entry.get("metadata", {})},
        )
        for index, entry in enumerate(entries)
    ]
