"""Where rows come from: a file, a folder, standard input, the Hub, or memory."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError

from blur_trainer.data.files import decoded, from_hub
from blur_trainer.data.sources import check_dataset, plain
from blur_trainer.data.tables import (
    ACCEPTED,
    KINDS,
    Table,
    checked_table,
    content_kind,
    read_table,
    suffix_of,
    table_of,
)

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_BESIDE_DATA = ("readme", "license", "licence", "dataset_infos")


def open_source(
    source: Any, role: str, config: str | None, split: str | None, token: str | bool | None, limit: int | None
) -> Table:
    """
    The first `limit` rows of a source, with the names of their places.

    Raises `ValueError`, `TypeError`, or `ConnectionError` where the Hub does not answer.
    """
    if isinstance(source, (str, Path)):
        table = _named(str(source), role, config, split, token, limit)
    else:
        table = _loaded(source, f"`{role}` dataset", role, split, limit)
    if limit is None or len(table.rows) <= limit:
        return table
    notes = [f"the first of {len(table.rows):,}", *table.notes]
    return Table(table.name, table.rows[:limit], table.places[:limit], table.columns, notes)


def _named(
    name: str, role: str, config: str | None, split: str | None, token: str | bool | None, limit: int | None
) -> Table:
    if name == "-":
        text = decoded(sys.stdin.buffer.read(), "standard input")
        return table_of(text, content_kind(text), "standard input", split)
    if not name.strip():  # an unset variable of a shell; as a path it would be the current folder
        raise ValueError(
            f"The name of the `{role}` data is empty: give a file, a folder, or a dataset's name on the Hub."
        )
    path = Path(name).expanduser()
    if path.is_file():
        _check_parts(path, role, config, split)
        return read_table(path, split)
    if path.is_dir():
        return _folder(path, role, split, limit)
    if not _HUB_NAME.fullmatch(name) or suffix_of(path) in KINDS:
        raise ValueError(
            f"There is no file or folder {name!r}: give one ({ACCEPTED}), a dataset's name on the Hub, or - for "
            "standard input."
        )
    split = split or _only_split(name, role, config, token)
    hint = f"If {name!r} should be a file or a folder: there is none. If the dataset wants a login: `hf auth login`."
    rows, where = from_hub(name, config, split, token, hint=hint)
    return _loaded(rows, where, role, None, limit)


def _check_parts(path: Path, role: str, config: str | None, split: str | None) -> None:
    """Raises `ValueError` for what one file cannot have. A JSON file may hold several lists."""
    if config is not None:
        raise ValueError(f"{path} is a file, which has no configurations: leave `config` (`--{role}_config`) out.")
    if split is not None and suffix_of(path) != ".json":
        raise ValueError(f"{path} is one table without splits: leave `split` (`--{role}_split`) out.")


def _loaded(source: Any, name: str, role: str, split: str | None, limit: int | None) -> Table:
    """The rows of a dataset in memory, a dictionary of splits, or a list."""
    if isinstance(source, Mapping):
        if not all(isinstance(rows, (Dataset, IterableDataset)) for rows in source.values()):
            raise TypeError(
                f"{name} is a {type(source).__name__} with the keys {list(source)[:8]}: give a list of dicts, or "
                "`datasets.Dataset.from_dict(...)` of columns."
            )
        chosen = _split_of(list(source), name, role, split)
        return _loaded(source[chosen], f"{name} (split {chosen!r})" if len(source) > 1 else name, role, None, limit)
    check_dataset(source, role)
    if isinstance(source, IterableDataset):
        if limit is None:
            raise TypeError(f"{name} is a stream: say by `limit` how many rows are read, or give it to the trainer.")
        source = list(source.take(limit))
    part = source
    if isinstance(source, Dataset):
        part = source if limit is None else source.select(range(min(limit, len(source))))
        # Pictures and sound are not decoded for nothing.
        media = [name for name, feature in source.features.items() if hasattr(feature, "decode")]
        part = part.remove_columns(media) if media else part
    rows = [{column: plain(value) for column, value in row.items()} for row in part]
    notes = [f"the first of {len(source):,}"] if len(part) < len(source) else []
    return checked_table(name, [(f"{name}, row {i}", row) for i, row in enumerate(rows)], notes)


def _folder(path: Path, role: str, split: str | None, limit: int | None) -> Table:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # made by `save_to_disk`
        return _loaded(datasets.load_from_disk(str(path)), str(path), role, split, limit)
    files = sorted(f for f in path.iterdir() if f.is_file() and not _is_beside(f))
    kinds = Counter(suffix_of(f) or f.name for f in files)
    if not files:
        folders = sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
        raise ValueError(
            f"The folder {path} has no files, and the folders {folders}: name one of them, or a file."
            if folders
            else f"The folder {path} is empty: give one with files ({ACCEPTED})."
        )
    if len(kinds) > 1 or not set(kinds) <= set(KINDS):
        there = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        raise ValueError(
            f"The folder {path} holds {there}: it must hold files of one kind ({ACCEPTED}). Name the file that is "
            "meant, or put what belongs together into a folder of its own."
        )
    files = _of_split(files, path, role, split)
    tables = [read_table(file, split) for file in files]
    for table in tables[1:]:
        if set(table.columns) != set(tables[0].columns):
            raise ValueError(
                f"The files of {path} differ: {tables[0].name} has the columns {tables[0].columns}, {table.name} has "
                f"{table.columns}. Give them the same ones, or one file."
            )
    placed = [pair for table in tables for pair in zip(table.places, table.rows, strict=True)]
    notes = list(dict.fromkeys(note for table in tables for note in table.notes))
    number = [f"{len(files)} files"] if len(files) > 1 else []
    return checked_table(str(path), placed, [*number, *notes])


def _is_beside(file: Path) -> bool:
    """Files that come with data and are none."""
    return file.name.startswith(".") or file.suffix.lower() == ".md" or file.stem.lower() in _BESIDE_DATA


def _of_split(files: list[Path], path: Path, role: str, split: str | None) -> list[Path]:
    """Training and test files in one folder are not mixed."""
    named = {file: match.group(1).lower() for file in files if (match := _SPLIT.match(file.name))}
    if len(set(named.values())) < 2 and split is None:
        return files
    if split is None:
        raise ValueError(
            f"The folder {path} holds the splits {sorted(set(named.values()))}: name one of them by "
            f"`split` (`--{role}_split {sorted(named.values())[0]}`), or give a file."
        )
    found = [file for file in files if named.get(file) == split or file.name.split(".")[0] == split]
    if not found:
        raise ValueError(f"The folder {path} has no file of the split {split!r}; it has {[f.name for f in files][:8]}.")
    return found


def _only_split(repo: str, role: str, config: str | None, token: str | bool | None) -> str:
    """The split of a dataset on the Hub that has one. Several are an error that lists them."""
    configs = [config] if config else _on_hub(datasets.get_dataset_config_names, repo, token=token)
    if len(configs) > 1 and "default" not in configs:
        raise ValueError(
            f"{repo!r} has the configurations {configs[:40]}: name one of them by `config` "
            f"(`--{role}_config {configs[0]}`)."
        )
    return _split_of(_on_hub(datasets.get_dataset_split_names, repo, config, token=token), repr(repo), role, None)


def _on_hub(look_up: Callable[..., list[str]], repo: str, *args: Any, token: str | bool | None) -> list[str]:
    try:
        return list(look_up(repo, *args, token=token))
    except (OSError, DatasetsError, ValueError) as error:
        raise ConnectionError(
            f"There is no file or folder {repo!r}, and no such dataset could be loaded from the Hub. "
            f"{type(error).__name__}: {error}"
        ) from error


def _split_of(splits: list[Any], name: str, role: str, split: str | None) -> Any:
    if split in splits:
        return split
    if split is None and len(splits) == 1:
        return splits[0]
    given = "" if split is None else f", and no {split!r}"
    raise ValueError(
        f"{name} has the splits {list(map(str, splits))}{given}: name one of them by `split` "
        f"(`--{role}_split {splits[0]}`)."
    )


__all__ = ["open_source"]
