"""Rows of a labelled source as their file gives them, each with its place; what cannot be read is told, not raised."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tea_rl.data.shipped import PREFIX, shipped_dataset
from tea_rl.data.tables import (
    FILE_READERS,
    check_file,
    open_dataset,
    open_table,
    parse_json_line,
    read_lines,
    read_text,
    refuse_kwargs,
    too_many_cells,
)
from tea_rl.errors import TeaError

_KEY = "data.dataset"


class Record(NamedTuple):
    """One row of a source.

    Attributes:
        place: file and line, or row.
        values: columns by name; empty when the row cannot be read.
        problem: why it cannot be read.
        typed: whether numbers and booleans come as such (CSV and text files have only text).
    """

    place: str
    values: dict[str, Any]
    problem: str | None = None
    typed: bool = True


def read_records(source: str, kwargs: Mapping[str, Any], key: str = _KEY) -> Iterator[Record]:
    """Rows of a ``.txt``, ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a ``datasets`` folder or Hub id, or a
    shipped dataset (``tea_rl/NAME``).

    JSON and CSV are read here rather than through ``datasets``, which neither knows lines nor rows of different shapes.

    Args:
        key: what gave the source, for errors.

    Raises:
        TeaError: if the source as a whole cannot be read.
    """
    if source.startswith(PREFIX) and not Path(source).exists():
        source, kwargs = str(shipped_dataset(source, kwargs)), {}
    path = Path(source)
    kind = path.suffix.lower()
    if kind != ".txt" and kind not in FILE_READERS:
        yield from _table_records(open_dataset(source, kwargs, key, "row"), source)
        return
    refuse_kwargs(kwargs, "a file")
    check_file(path, key, "row")
    if kind == ".txt":
        for number, line in read_lines(path):
            # White space around a line is a slip of the editor that would change its tokens.
            yield Record(f"{path} line {number}", {"text": line.strip()}, typed=False)
    elif kind == ".jsonl":
        yield from _jsonl_records(path)
    elif kind == ".json":
        yield from _json_records(path)
    elif kind == ".csv":
        yield from _csv_records(path)
    else:
        yield from _table_records(open_table(path, "row"), source)


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in read_lines(path):
        value = parse_json_line(line)
        place = f"{path} line {number}"
        yield Record(place, {}, value) if isinstance(value, str) else Record(place, value)


def _json_records(path: Path) -> Iterator[Record]:
    text = read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TeaError(
            f"{path}: expected a JSON list of objects, got invalid JSON ({error}); mend it."
        ) from None
    if not isinstance(rows, list):
        raise TeaError(
            f"{path}: expected a JSON list of objects, got {type(rows).__name__}; write [...] around it."
        )
    for number, row in enumerate(rows, 1):
        place = f"{path} row {number}"
        if isinstance(row, dict):
            yield Record(place, row)
        else:
            yield Record(place, {}, f"expected a JSON object, got {type(row).__name__}; mend it.")


def _csv_records(path: Path) -> Iterator[Record]:
    # Texts may be longer than the module's own limit on a cell, which protects no one here.
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path} line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Record(place, {}, f"expected CSV, got: {error}; check the double quotes.")
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [name.strip() for name in cells]
        elif len(cells) > len(header):
            yield Record(place, {}, too_many_cells(len(header), len(cells)))
        else:
            padded = [*cells, *[""] * (len(header) - len(cells))]
            values = {name: cell if cell else None for name, cell in zip(header, padded, strict=True)}
            yield Record(place, values, typed=False)


def _table_records(table: Any, source: str) -> Iterator[Record]:
    for number, values in enumerate(table, 1):
        yield Record(f"{source} row {number}", dict(values))
