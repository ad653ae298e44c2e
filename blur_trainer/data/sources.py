"""A user's dataset, list or stream -> one with the columns that are read, row by row as the user would see it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from blur_trainer.data.columns import columns_read
from blur_trainer.data.rows import check_row, with_texts

_CONVERSATIONS = ("messages", "prompt", "completion")


def check_dataset(dataset: Any, role: str) -> None:
    """Raise `TypeError` when `dataset` is neither a dataset nor a list of dicts, `ValueError` when it is empty."""
    if isinstance(dataset, Mapping):  # DatasetDict and IterableDatasetDict are dicts
        raise TypeError(
            f"The `{role}` dataset is a {type(dataset).__name__} with the splits {sorted(map(str, dataset))}: "
            "pick one of them, e.g. `dataset['train']`."
        )
    if isinstance(dataset, str):
        raise TypeError(f"The `{role}` dataset is the string {dataset!r}: load it first, `datasets.load_dataset(...)`.")
    if not isinstance(dataset, (Dataset, IterableDataset, list)):
        raise TypeError(
            f"The `{role}` dataset is a {type(dataset).__name__}: pass a `datasets.Dataset`, a "
            "`datasets.IterableDataset` or a list of dicts."
        )
    if isinstance(dataset, list):
        for index, row in enumerate(dataset):
            if not isinstance(row, Mapping):
                raise TypeError(f"Row {index} of the `{role}` list is a {type(row).__name__}: each row must be a dict.")
    if _is_empty(dataset):
        raise ValueError(f"The `{role}` dataset is empty: it needs at least one example.")


def _is_empty(dataset: Dataset | IterableDataset | list) -> bool:
    """Of a stream whose columns are known, no row is read here: it might hold an image that cannot be decoded."""
    if not isinstance(dataset, IterableDataset):
        return len(dataset) == 0
    return dataset.column_names is None and next(iter(dataset), None) is None


def column_names(dataset: Dataset | IterableDataset | list) -> list[str]:
    """
    Column names as rows have them: those that a transform gives, those that `set_format(columns=...)` left.

    For a stream without a schema, its first example is read.
    """
    if isinstance(dataset, list):
        return list(dict.fromkeys(key for row in dataset for key in row))
    if isinstance(dataset, Dataset):
        if _has_transform(dataset):
            return list(dataset[0])
        return list(dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"])
    return get_dataset_column_names(dataset)


def _has_transform(dataset: Any) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def to_dataset(dataset: Dataset | IterableDataset | list, fmt: str, role: str, *, has_template: bool) -> Any:
    """
    A `datasets` object with the columns that are read.

    The rows of a list are checked first, because Arrow's own errors name no row. So are those of a dataset with a
    transform, which gives each row once.
    """
    columns = columns_read(fmt, column_names(dataset))
    if isinstance(dataset, list) or _has_transform(dataset):
        rows = [{column: plain(row[column]) for column in columns if column in row} for row in dataset]
        for index, row in enumerate(rows):
            check_row(row, index, fmt, role, has_template=has_template)
            if row.keys() != rows[0].keys():  # Arrow would silently drop columns that the first row lacks
                raise ValueError(
                    f"Row {index} of the `{role}` dataset has the columns {sorted(dataset[index])}, row 0 has "
                    f"{sorted(dataset[0])}: all rows of a list must have the same ones."
                )
            _check_kinds(row, rows[0], index, role)
        return _from_list(rows, role)
    selected = dataset.with_format(None).select_columns(columns)  # rows as Python lists, whatever the user's format
    if isinstance(selected, IterableDataset) and next(iter(selected), None) is None:
        raise ValueError(f"The `{role}` dataset is empty: it needs at least one example.")
    return selected


def _from_list(rows: list[dict[str, Any]], role: str) -> Dataset:
    rows = [
        {c: with_texts(v) if c in _CONVERSATIONS and isinstance(v, list) else v for c, v in r.items()} for r in rows
    ]
    try:
        return Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's are these
        raise ValueError(
            f"The rows of the `{role}` list do not fit into one table: {error}. Give each column, and each key of its "
            "messages, values of one type."
        ) from error


def _check_kinds(row: Mapping[str, Any], first: Mapping[str, Any], index: int, role: str) -> None:
    for column in ("prompt", "completion"):
        if column in row and isinstance(row[column], list) != isinstance(first[column], list):
            raise TypeError(
                f"Column `{column}` is a {type(first[column]).__name__} in row 0 and a {type(row[column]).__name__} in "
                f"row {index} of the `{role}` dataset: all rows of a dataset must be strings, or all messages."
            )


def plain(value: Any) -> Any:
    """Arrays, tensors and numpy's numbers as Python's own, which Arrow and the checks know."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, list) and any(isinstance(entry, np.generic | torch.Tensor) for entry in value):
        return [plain(entry) for entry in value]
    return value


__all__ = ["check_dataset", "column_names", "plain", "to_dataset"]
