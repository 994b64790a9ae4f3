"""Opening what rows are read from: files and ``datasets``, with errors that name file and line."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tea_rl.errors import TeaError, did_you_mean

FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DATASET_KWARGS = ("name", "split", "data_dir", "revision")


def refuse_kwargs(kwargs: Mapping[str, Any], source: str) -> None:
    """Only datasets and generators take ``data.kwargs``."""
    if kwargs:
        raise TeaError(
            f"data.kwargs is for datasets and reasoning_gym generators, got {', '.join(map(str, kwargs))} for {source}; "
            "remove it."
        )


def check_file(path: Path, key: str, what: str) -> None:
    """Refuse a path that is no readable, non-empty file.

    Args:
        key: the recipe's key that gave the path.
        what: what the file should hold, such as ``"prompt"``.
    """
    if path.is_dir():
        raise TeaError(f"expected a file of {what}s, got the folder {path}; name a file in it.")
    if not path.is_file():
        nearby = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TeaError(
            f"the file of {what}s {path} does not exist; check {key}.{did_you_mean(path.name, nearby)}"
        )
    try:
        if path.stat().st_size == 0:
            raise TeaError(empty(path, what))
        with path.open("rb"):
            pass
    except OSError as error:
        raise TeaError(f"{path}: cannot be read: {error.strerror}.") from None


def empty(source: str | Path, what: str) -> str:
    """The message for a source without rows."""
    got = "an empty file" if isinstance(source, Path) else "an empty source"
    return f"{source}: expected at least one {what}, got {got}; add {what}s."


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1 and without their ends.

    Only real line ends part lines: JSON and prose may hold the separators ``str.splitlines`` also splits at.

    Raises:
        TeaError: for bytes that are not UTF-8.
    """
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), 1):
        if line.strip():
            yield number, line.rstrip("\n")


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, line ends as they are.

    Raises:
        TeaError: naming the line with other bytes.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TeaError(
            f"{path} line {line}: expected UTF-8 text, got other bytes; save it as UTF-8."
        ) from None


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """Import ``datasets`` and keep its progress bars and log lines off the terminal for a moment."""
    import datasets

    shown, verbosity = datasets.utils.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")  # warns of folders without a dataset card
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if shown:
            datasets.utils.enable_progress_bars()


def open_table(path: Path, what: str) -> Any:
    """A JSONL, JSON, CSV or Parquet file as a ``datasets.Dataset``."""
    with quiet_datasets() as datasets:
        try:
            reader = FILE_READERS[path.suffix.lower()]
            return datasets.load_dataset(reader, data_files=str(path), split="train")
        except Exception as error:  # the readers raise whatever their parsers raise
            raise TeaError(_bad_table(path, error, what)) from error


def _bad_table(path: Path, error: BaseException, what: str) -> str:
    """Say where a file is broken: the readers name neither file nor line."""
    kind = path.suffix.lower()
    found = {".jsonl": _bad_jsonl, ".json": _bad_json, ".csv": _bad_csv}.get(kind, lambda path, what: None)(
        path, what
    )
    return found or f"{path}: expected {kind[1:]} rows with the same columns, got: {root_cause(error)}."


def _bad_jsonl(path: Path, what: str) -> str | None:
    try:
        lines = list(read_lines(path))
    except TeaError as not_text:
        return str(not_text)
    for number, line in lines:
        bad = parse_json_line(line)
        if isinstance(bad, str):
            return f"{path} line {number}: {bad}"
    return None if lines else empty(path, what)


def parse_json_line(line: str) -> dict[str, Any] | str:
    """The object of a JSONL line, or what is wrong with it."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as bad_json:  # its own "line 1" would be taken for the file's
        return f"expected a JSON object, got invalid JSON ({bad_json.msg} at column {bad_json.colno}); mend the line."
    except (ValueError, RecursionError) as bad_json:
        return f"expected a JSON object, got invalid JSON ({bad_json}); mend the line."
    if not isinstance(value, dict):
        return f"expected a JSON object, got {type(value).__name__}; mend the line."
    return value


def _bad_json(path: Path, what: str) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as bad_json:
        return f"{path}: expected a JSON list of objects, got invalid JSON ({bad_json}); mend it."
    return None


def _bad_csv(path: Path, what: str) -> str | None:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            width = len(next(reader, []))
            for cells in reader:
                if len(cells) > width:
                    return f"{path} line {reader.line_num}: {too_many_cells(width, len(cells))}"
    except (csv.Error, UnicodeDecodeError) as bad_csv:
        return f"{path}: expected UTF-8 CSV, got {' '.join(str(bad_csv).split())}."
    return None


def too_many_cells(expected: int, got: int) -> str:
    """What is wrong with a CSV line that has more cells than the header."""
    return f"expected {expected} columns, got {got}; put text that holds commas in double quotes."


def root_cause(error: BaseException) -> str:
    """First 200 characters of the innermost error's text, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200].rstrip(".")


def open_dataset(source: str, kwargs: Mapping[str, Any], key: str, what: str) -> Any:
    """Open a folder saved by ``datasets``, a folder of data files, or a Hub dataset.

    Raises:
        TeaError: if it cannot be opened; names ``key``, the recipe's key that gave the source.
    """
    for name in kwargs:
        if name not in _DATASET_KWARGS:
            hint = did_you_mean(name, _DATASET_KWARGS)
            raise TeaError(f'data.kwargs: a dataset takes {", ".join(_DATASET_KWARGS)}; got "{name}".{hint}')
    _refuse_other_files(source, key)
    path = Path(source)
    local = path.exists()
    with quiet_datasets() as datasets:
        try:
            saved = local and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
            if not saved:
                return datasets.load_dataset(source, **{"split": "train", **kwargs})
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict):
                table = table[_pick_split(kwargs.get("split", "train"), table, source)]
            return table
        except TeaError:
            raise
        except Exception as error:
            if local:
                raise TeaError(_bad_folder(path, error, key, what)) from error
            raise TeaError(
                f"{key}: expected a file of {what}s, a datasets folder or a Hub dataset that can be reached, got "
                f'"{source}" ({root_cause(error)}); check the path or the id.'
            ) from error


def _bad_folder(path: Path, error: BaseException, key: str, what: str) -> str:
    """Say what is wrong with a folder in our own words: those of ``datasets`` are about its builders."""
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in FILE_READERS and file.is_file())
    kinds = {file.suffix.lower() for file in found}
    if len(kinds) == 1:
        for file in found:
            try:
                open_table(file, what)
            except TeaError as bad:
                return str(bad)
        return f"{key}: the files in the folder {path} cannot be read together: {root_cause(error)}; name one of them."
    names = ", ".join(file.name for file in found[:4]) + (", ..." if found[4:] else "")
    got = f"with files of several kinds ({names}); name one of them" if found else "without any; name a file"
    return (
        f"{key}: expected a folder with data files of one kind ({', '.join(FILE_READERS)}), got {path} {got}."
    )


def _refuse_other_files(source: str, key: str) -> None:
    """Answer files of other kinds and missing paths here: ``datasets`` would ask the Hub about them."""
    path = Path(source)
    if not source.strip():
        raise TeaError(f"{key}: expected the name of a file, folder or dataset, got blank text; name one.")
    if path.exists() and not path.is_dir():
        endings = ", ".join([".txt", *FILE_READERS])
        raise TeaError(f"{key}: expected a file ending in {endings}, got {source}; rename or convert it.")
    if not path.exists() and (path.is_absolute() or path.suffix.lower() in (".tsv", ".yaml", ".py")):
        raise TeaError(f"{key}: {source} does not exist; check the path.")


def _pick_split(split: str, table: Mapping[str, Any], source: str) -> str:
    if split not in table:
        raise TeaError(
            f'{source}: no split "{split}"; it has {", ".join(table)}: set data.kwargs {{split: ...}}.'
        )
    return split
