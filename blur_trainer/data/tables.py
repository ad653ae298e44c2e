"""Files of rows: CSV, TSV, JSON, JSON lines, Parquet, text, each also as `.gz`. Every row knows where it stands."""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blur_trainer.data.files import is_json, is_one_value, json_lines, parse_json, read_text
from blur_trainer.data.recognized import NAMES, simple

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")
ACCEPTED = ".csv, .tsv, .json, .jsonl, .parquet or .txt (each also as .gz)"
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_LONGEST_CELL = 2**31 - 1  # a book in one cell; Python's own limit is 128 KiB


@dataclass(frozen=True)
class Table:
    """
    Args:
        name: of the file, for messages.
        rows: column name to value.
        places: where each row stands, for messages.
        columns: the names, in the order of the file.
        notes: what a user should know of how the file was read.
    """

    name: str
    rows: list[dict[str, Any]]
    places: Sequence[str]
    columns: list[str]
    notes: list[str] = field(default_factory=list)


def suffix_of(path: Path) -> str:
    """`.jsonl` of `a.JSONL.gz`."""
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def read_table(path: Path, part: str | None = None) -> Table:
    """
    The rows of one file.

    Args:
        part: the list that is meant in a JSON file with several, such as `{"train": [...], "test": [...]}`.

    Raises:
        `ValueError`, which names the file, the line and the remedy.
    """
    suffix, name = suffix_of(path), str(path)
    if suffix not in KINDS:
        raise ValueError(
            f"{path} is a {suffix or 'file without a suffix'}, which is not read: give {ACCEPTED}. A program for "
            "spreadsheets can save as CSV in UTF-8."
        )
    if suffix == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if suffix == ".txt" and (better := content_kind(text)) != ".txt":
        raise ValueError(
            f"{name} is a .txt file, which is read as one text, but {_SEEN[better]}: rename it to "
            f"{path.name.replace('.txt', better)}."
        )
    return table_of(text, suffix, name, part)


_SEEN = {
    ".json": "it holds JSON",
    ".jsonl": "it holds JSON",
    ".csv": "it starts like a table, with column names in the first line",
}


def table_of(text: str, suffix: str, name: str, part: str | None = None) -> Table:
    """The rows of a text, as a file with that suffix would hold it."""
    if suffix == ".txt":
        return Table(name, [{"text": text}], [name], ["text"])
    if suffix in (".csv", ".tsv"):
        return _csv(text, name, "\t" if suffix == ".tsv" else None)
    if is_one_value(text, ".json" if suffix == ".json" else ".jsonl"):
        return _nested(parse_json(text, name), name, part)
    return checked_table(name, json_lines(text, name))


def content_kind(text: str) -> str:
    """The suffix that fits a text of unknown kind: `.json`, `.jsonl`, `.csv` or `.txt`."""
    first = text.lstrip().split("\n", 1)[0]
    if is_json(text, dict) or is_json(text, list):
        return ".json"
    if first.startswith('{"') or is_json(first, dict):  # if it is broken, its error names the line
        return ".jsonl"
    names = {simple(cell) for cell in _cells(first, _delimiter(first))}
    asked, answered = names & {*NAMES["prompt"], *NAMES["question"]}, names & {*NAMES["completion"]}
    return ".csv" if asked and answered else ".txt"


def checked_table(name: str, placed: Sequence[tuple[str, Any]], notes: Sequence[str] = ()) -> Table:
    """Rows that came as values of any kind. A string is a text."""
    placed = [(place, {"text": row} if isinstance(row, str) else row) for place, row in placed]
    for place, row in placed:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is a {type(row).__name__}: it must be an object with named columns, or a text.")
    if not placed:
        raise ValueError(f"{name} has no rows: it must have at least one.")
    rows = [row for _, row in placed]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(name, rows, [place for place, _ in placed], columns, list(notes))


def _parquet(path: Path) -> Table:
    # Not `load_dataset`: it leaves a copy in the user's cache and takes characters of a file's name as a pattern.
    try:
        table = pq.read_table(io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix.lower() == ".gz" else path)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}.") from error
    return checked_table(str(path), [(f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1)])


def _csv(text: str, name: str, delimiter: str | None) -> Table:
    """
    A table in quotes as spreadsheets write it. Every cell stays the text that it is.

    Not `pandas`: it makes numbers of "007" and dates, nothing of "NA", and fills up or shifts the cells of a row that
    has too few or too many.
    """
    header = text.lstrip("\n").split("\n", 1)[0]
    found = delimiter or _delimiter(header)
    placed = []
    with _long_cells():
        lines = _csv_rows(text, name, found)
        _, names = next(lines, (0, []))
        names = [cell.strip() and cell for cell in names]
        twice = sorted({cell for cell in names if cell and names.count(cell) > 1})
        if twice:
            raise ValueError(f"{name} has the column {twice[0]!r} twice: rename one of them.")
        for line, cells in lines:
            if len(cells) != len(names):
                raise ValueError(
                    f"{name}, line {line} has {len(cells)} cells and the first line has {len(names)} names: a cell "
                    f"with {_DELIMITERS[found]} in it needs quotes around it. The columns are {names}."
                )
            placed.append((f"{name}, line {line}", dict(zip(names, cells, strict=True))))
    for _, row in placed:
        row.pop("", None)  # a column without a name: the row numbers of pandas, or an empty one of a spreadsheet
    notes = [f"cells parted by {_DELIMITERS[found]}"] if found not in (",", "\t") else []
    return checked_table(name, placed, notes)


def _csv_rows(text: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the line that they start in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name}: the row that starts in line {start} cannot be read: {error}. A cell in quotes must end with one, "
            'and a quote inside of it is written twice ("").'
        ) from error


def _delimiter(header: str) -> str:
    """What parts the names in the first line best. Not `csv.Sniffer`, which fails on a table of one column."""
    return max(_DELIMITERS, key=lambda delimiter: len(_cells(header, delimiter)))


def _cells(line: str, delimiter: str) -> list[str]:
    with _long_cells():
        return next(csv.reader([line], delimiter=delimiter), [])


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _nested(value: Any, name: str, part: str | None) -> Table:
    """The rows of one JSON value: a list, an object with one list of objects, or SQuAD's paragraphs."""
    notes = []
    lists = _lists(value) if isinstance(value, dict) else {}
    if isinstance(value, dict) and not lists:
        turns = any(isinstance(entry, list) and entry and isinstance(entry[0], dict) for entry in value.values())
        if not turns and not any(isinstance(entry, str) for entry in value.values()):
            raise ValueError(
                f"{name} holds one object with the keys {list(value)[:8]}, and rows are not found in it: write a list "
                'of objects (pandas: `to_json(..., orient="records", lines=True)`).'
            )
        value = [value]  # one row
    elif lists:
        key = part if part in lists else next(iter(lists))
        if part not in lists and len(lists) > 1:
            raise ValueError(f"{name} has several lists of rows, {list(lists)}: name one of them by `split`.")
        value, notes = lists[key], [f"rows under `{key}`"]
    if not isinstance(value, list):
        raise ValueError(
            f"{name} holds no rows, but a value of type {type(value).__name__}: it must hold a list of objects."
        )
    if value and all(isinstance(entry, dict) and isinstance(entry.get("paragraphs"), list) for entry in value):
        return checked_table(name, _squad(value, name), [*notes, "questions of SQuAD's paragraphs"])
    return checked_table(name, [(f"{name}, row {i}", row) for i, row in enumerate(value, 1)], notes)


def _lists(value: dict[str, Any]) -> dict[str, list[Any]]:
    """The values that are lists of objects. Messages are lists of objects too, and make one row."""
    found = {key: v for key, v in value.items() if isinstance(v, list) and v and all(isinstance(e, dict) for e in v)}
    return {key: v for key, v in found.items() if not {"role", "from"} & v[0].keys()}


def _squad(articles: list[Any], name: str) -> list[tuple[str, Any]]:
    number = itertools.count(1)
    return [
        (f"{name}, question {next(number)}", {"context": paragraph.get("context"), **question})
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph.get("qas", [])
    ]


__all__ = ["ACCEPTED", "KINDS", "Table", "checked_table", "content_kind", "read_table", "suffix_of", "table_of"]
