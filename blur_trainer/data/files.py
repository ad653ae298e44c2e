"""Reads one split of a benchmark from the Hub or from a local file. Errors say where they arose and what to do."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError

_HINT = (
    "Without access to it, pass a local copy as data_dir (--data_dir), or corpus='embedded'. "
    "If it wants a login, pass token, or run `hf auth login`."
)


def from_hub(
    repo: str, config: str | None, split: str, token: str | bool | None, *, hint: str = _HINT
) -> tuple[Dataset, str]:
    """Returns the rows of a split on the Hub and its name for messages. `ConnectionError` carries `hint`."""
    where = f"{repo!r} ({f'config {config!r}, ' if config else ''}split {split!r})"
    try:
        return datasets.load_dataset(repo, config, split=split, token=token), where
    except (OSError, DatasetsError, ValueError) as error:
        raise ConnectionError(
            f"could not load {where} from the Hub. {type(error).__name__}: {error}\n{hint}"
        ) from error


def checked_folder(data_dir: str | Path) -> Path:
    """Returns `data_dir` as a path. Raises if it is no folder."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"data_dir is {str(folder)!r}, which is not a folder.")
    return folder


def find_file(folder: Path, names: Iterable[str], what: str) -> Path | None:
    """Returns the existing file of these names, or None. Two files are an error, because they may differ."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"several files hold {what}: {', '.join(map(str, found))}. Leave one of them in the folder.")
    return found[0] if found else None


def read_rows(file: Path) -> list[Any]:
    """The rows of a `.jsonl` or `.json` file (a list), or a `.txt` file as one row with `text`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
    if not text.strip():
        raise ValueError(f"{file} is empty; it must hold at least one row.")
    if file.suffix == ".txt":
        return [{"text": text}]
    if file.suffix == ".jsonl":
        # Not splitlines(): JSON strings may contain U+2028 unescaped.
        return [_parse(line, f"{file}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = _parse(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a {type(rows).__name__}; it must hold a list of objects.")
    return rows


def read_lines(file: Path) -> list[Any]:
    """
    The texts of a file with one text per line: objects (`{"text": ...}`), JSON strings, or plain lines.

    The first line decides which of the three. A `.json` file is a list of objects or of strings.
    """
    if file.suffix == ".json":
        return read_rows(file)
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
    if not lines:
        raise ValueError(f"{file} is empty; it must hold at least one row.")
    if not lines[0].lstrip().startswith("{") and not _is_json_string(lines[0]):
        return [line.rstrip("\r") for line in lines]
    return [_parse(line, f"{file}, row {i}") for i, line in enumerate(lines, 1)]


def _is_json_string(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str)
    except json.JSONDecodeError:
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error


def checked_rows(rows: Iterable[Any], columns: Sequence[str], where: str) -> Iterator[Mapping[str, Any]]:
    """Yields the rows. Each must be an object whose `columns` are strings. No rows at all is an error."""
    i = 0
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise TypeError(f"{where}, row {i} is a {type(row).__name__}; it must be an object with {list(columns)}.")
        for column in columns:
            if column not in row:
                raise ValueError(f"{where}, row {i} has no column {column!r}; it has {sorted(row)}.")
            if not isinstance(row[column], str):
                kind = type(row[column]).__name__
                raise TypeError(f"{where}, row {i}, column {column!r} is of type {kind}; it must be a string.")
        yield row
    if not i:
        raise ValueError(f"{where} has no rows; it must have at least one.")
