"""The sets of questions or texts that an evaluation reads: datasets, or lists of dicts."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset


def as_datasets(data: Mapping[str, Any]) -> dict[str, Dataset]:
    """Each set as a `Dataset`. Raises `TypeError`, by name, for what is neither a dataset nor a list of dicts."""
    if not isinstance(data, Mapping):
        raise TypeError(f"`data` is a {type(data).__name__}; it maps names of sets to datasets, or is a `DatasetDict`.")
    return {key: _as_dataset(key, rows) for key, rows in data.items()}


def _as_dataset(key: str, rows: Any) -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        kind = "list of other things than dicts" if isinstance(rows, list) else type(rows).__name__
        raise TypeError(f"The set `{key}` of `data` is a {kind}; it takes a `datasets.Dataset` or a list of dicts.")
    different = next((i for i, row in enumerate(rows) if row.keys() != rows[0].keys()), None)
    if different is not None:  # Arrow would drop the columns that the first row lacks
        raise ValueError(
            f"Row {different} of the set `{key}` has the columns {sorted(rows[different])}, row 0 has "
            f"{sorted(rows[0])}: all rows of a list must have the same ones."
        )
    return Dataset.from_list([dict(row) for row in rows])
