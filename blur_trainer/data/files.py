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
    """
    Returns the existing file of these names, or None.

    Two files are an error, because they may differ. So is a file of such a name in another format (CSV, Parquet,
    compressed), which would be passed over in silence.
    """
    names = list(names)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"several files hold {what}: {', '.join(map(str, found))}. Leave one of them in the folder.")
    if found:
        return found[0]
    stems = {folder / name.rpartition(".")[0] for name in names}
    patterns = [(stem.parent, stem.name + end) for stem in stems for end in (".*", "-[0-9]*.*")]
    others = sorted(str(file) for parent, pattern in patterns for file in parent.glob(pattern) if file.is_file())
    if others:
        suffixes = sorted({Path(name).suffix for name in names})
        raise ValueError(
            f"{what} is there as {others[0]}, which is not read: give it as {' or '.join(suffixes)}, e.g. with "
            "`datasets.load_dataset(...).to_json(...)`."
        )
    return None


def read_json(file: str | Path) -> Any:
    """The content of a JSON file. A malformed file is a `ValueError` that names it."""
    return _parse(_read(Path(file)), str(file))


def read_rows(file: Path) -> list[Any]:
    """The rows of a `.jsonl` or `.json` file (lines or a list), or a `.txt` file as one row with `text`."""
    text = _read(file)
    return [{"text": text}] if file.suffix == ".txt" else _json_rows(text, file)


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
    if not text.strip():
        raise ValueError(f"{file} is empty; it must hold at least one row.")
    return text


def _json_rows(text: str, file: Path) -> list[Any]:
    """JSON lines or a JSON list, whatever the suffix: the Hub's files of TOFU are lines under the name `.json`."""
    # Not splitlines(): JSON strings may contain U+2028 unescaped.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    one_value = file.suffix == ".json" and (len(lines) == 1 or not _is_json(lines[0][1]))
    if not one_value and not _is_list_of_objects(text):
        return [_parse(line, f"{file}, line {i}") for i, line in lines]
    rows = _parse(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a {type(rows).__name__}; it must hold a list of objects, or one per line.")
    return rows


def read_lines(file: Path) -> list[Any]:
    """
    The texts of a file with one text per line: objects (`{"text": ...}`), JSON strings, or plain lines.

    The first line decides which of the three. A `.json` or `.jsonl` file may also be one list.
    """
    text = _read(file)
    if file.suffix == ".json" or (file.suffix == ".jsonl" and _is_list_of_objects(text)):
        return _json_rows(text, file)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines[0].lstrip().startswith("{") and not _is_json(lines[0], str):
        return [line.rstrip("\r") for line in lines]
    return [_parse(line, f"{file}, row {i}") for i, line in enumerate(lines, 1)]


def _is_list_of_objects(text: str) -> bool:
    return text.lstrip().startswith("[") and _is_json(text, list) and isinstance(next(iter(json.loads(text)), 0), dict)


def _is_json(text: str, kind: type = object) -> bool:
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, a number of thousands of digits, nested too deep
        raise ValueError(f"{where} is not JSON that can be read: {error}.") from error


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
            _check_unicode(row[column], f"{where}, row {i}, column {column!r}")
        yield row
    if not i:
        raise ValueError(f"{where} has no rows; it must have at least one.")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is no Unicode text: character {error.start} is half of a surrogate pair.") from error
