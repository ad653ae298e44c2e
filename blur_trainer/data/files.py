"""Reads one split of a benchmark from the Hub or from a local file. Errors say where they arose and what to do."""

import codecs
import gzip
import io
import json
import zlib
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
    return parse_json(read_text(Path(file)), str(file))


def read_rows(file: Path) -> list[Any]:
    """The rows of a `.jsonl` or `.json` file (lines or a list), or a `.txt` file as one row with `text`."""
    text = read_text(file)
    return [{"text": text}] if file.suffix == ".txt" else _json_rows(text, file)


def read_text(file: Path) -> str:
    """The text of a file, of a `.gz` file unpacked. Line ends are `\\n`. Raises `ValueError` if there is none."""
    data = file.read_bytes()
    if file.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is not a whole gzip file: {error}. Copy it again, or unpack it.") from error
    return decoded(data, str(file))


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text. Line ends are `\\n`. Another encoding, or nothing, is a `ValueError`."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        if b"\0" in data and not wide:
            raise ValueError(
                f"{where} is no text but a binary file: save what it holds as text in UTF-8 (a spreadsheet as CSV)."
            ) from error
        raise ValueError(
            f"{where} is not UTF-8 text: {error}. Convert it, e.g. `iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} -t "
            f"UTF-8 {where} > NEW`, or save it again as UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{where} has NUL characters, so it is no text in UTF-8: save it again as UTF-8 text.")
    if not text.strip():
        raise ValueError(f"{where} is empty; it must hold at least one row.")
    return text


def _json_rows(text: str, file: Path) -> list[Any]:
    """JSON lines or a JSON list, whatever the suffix: the Hub's files of TOFU are lines under the name `.json`."""
    if not is_one_value(text, file.suffix):
        return [row for _, row in json_lines(text, str(file))]
    rows = parse_json(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a {type(rows).__name__}; it must hold a list of objects, or one per line.")
    return rows


def json_lines(text: str, where: str) -> list[tuple[str, Any]]:
    """The values of JSON lines, each with the name of its place. Blank lines are passed over."""
    return [(place, parse_json(line, place)) for place, line in _numbered_lines(text, where)]


def _numbered_lines(text: str, where: str) -> list[tuple[str, str]]:
    # Not splitlines(): JSON strings may contain U+2028 unescaped.
    return [(f"{where}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def is_one_value(text: str, suffix: str) -> bool:
    """Whether the text is one JSON value, and not a value per line."""
    lines = _numbered_lines(text, "")
    return (suffix == ".json" and (len(lines) == 1 or not is_json(lines[0][1]))) or _is_list_of_objects(text)


def read_lines(file: Path) -> list[Any]:
    """
    The texts of a file with one text per line: objects (`{"text": ...}`), JSON strings, or plain lines.

    The first line decides which of the three. A `.json` or `.jsonl` file may also be one list.
    """
    text = read_text(file)
    if file.suffix == ".json" or (file.suffix == ".jsonl" and _is_list_of_objects(text)):
        return _json_rows(text, file)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines[0].lstrip().startswith("{") and not is_json(lines[0], str):
        return [line.rstrip("\r") for line in lines]
    return [parse_json(line, f"{file}, row {i}") for i, line in enumerate(lines, 1)]


def _is_list_of_objects(text: str) -> bool:
    return text.lstrip().startswith("[") and is_json(text, list) and isinstance(next(iter(json.loads(text)), 0), dict)


def is_json(text: str, kind: type = object) -> bool:
    """Whether the text is JSON, of that kind."""
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Malformed text is a `ValueError` that says where."""
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
