"""Tells the format of a dataset from its columns, and raises one-line errors for wrong columns or rows."""

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

# The first match wins: tokens first (the user has tokenized already), plain text last.
FORMATS: dict[str, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
ACCEPTED = "`text`, `prompt`+`completion`, `messages`, `question`+`answer` or `input_ids`(+`labels`)"


def find_format(columns: Iterable[str], role: str) -> str:
    """Name of the first format in `FORMATS` whose columns are all present; `ValueError` when there is none."""
    columns = list(columns)
    for name, needed in FORMATS.items():
        if set(needed) <= set(columns):
            return name
    raise ValueError(f"The `{role}` dataset has the columns {columns}, but needs {ACCEPTED}: rename its columns.")


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
    if (len(dataset) == 0) if not isinstance(dataset, IterableDataset) else (next(iter(dataset), None) is None):
        raise ValueError(f"The `{role}` dataset is empty: it needs at least one example.")


def column_names(dataset: Dataset | IterableDataset | list) -> list[str]:
    """Column names of a list of dicts or a dataset. For a stream without a schema, its first example is read."""
    if isinstance(dataset, list):
        return list(dict.fromkeys(key for row in dataset for key in row))
    return get_dataset_column_names(dataset)


def check_row(row: Mapping[str, Any], index: int, fmt: str, role: str, *, has_template: bool) -> None:
    """
    Raise when a field of one row does not fit its format.

    Args:
        row (`Mapping`): Column name to value.
        index (`int`): Position of the row in its dataset, for the message.
        fmt (`str`): Name in `FORMATS`.
        role (`str`): What the dataset is for (`"forget"`, `"retain"`), for the message.
        has_template (`bool`): Whether the tokenizer has a chat template, without which messages cannot be rendered.

    Raises:
        `TypeError`: a field is not a string (or list of messages, or list of token ids).
        `ValueError`: messages without a chat template, or whose last role is not `assistant`; `labels` of another
            length than `input_ids`.
    """
    where = f"row {index} of the `{role}` dataset"
    if fmt == "input_ids":
        return _check_tokens(row, where)
    conversational = fmt == "messages" or (fmt == "prompt-completion" and isinstance(row.get("prompt"), list))
    for column in FORMATS[fmt]:
        if conversational:
            _check_messages(row.get(column), column, where, answer=column != "prompt")
        elif not isinstance(row.get(column), str):
            raise TypeError(f"Column `{column}` in {where} is a {_type(row.get(column))}: it must be a string.")
    if conversational and not has_template:
        raise ValueError(
            f"The `{role}` dataset holds messages, but the tokenizer has no chat template: set "
            "`tokenizer.chat_template`, or give `prompt` and `completion` as strings."
        )
    if conversational:
        _check_prompt(row["messages"][:-1] if fmt == "messages" else row["prompt"], where)


def _check_prompt(messages: list[dict[str, Any]], where: str) -> None:
    role = messages[-1]["role"] if messages else None
    if role not in ("user", "tool", "assistant"):
        raise ValueError(
            f"The prompt in {where} ends with {'no message' if role is None else f'the role {role!r}'}: an answer "
            "must follow a message of the role 'user', 'tool' or 'assistant'."
        )


def _check_messages(value: Any, column: str, where: str, *, answer: bool) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise TypeError(
            f"Column `{column}` in {where} is a {_type(value)}: it must be a list of messages "
            '`{"role": ..., "content": ...}`, at least one.'
        )
    last = value[-1]
    if answer and last["role"] != "assistant":
        raise ValueError(
            f"The last message of `{column}` in {where} has the role {last['role']!r}: it is the answer, so its role "
            "must be 'assistant'."
        )
    if answer and not isinstance(last.get("content"), str):
        raise TypeError(f"The answer in `{column}` in {where} is a {_type(last.get('content'))}: it must be a string.")


def _check_tokens(row: Mapping[str, Any], where: str) -> None:
    for ids, labels in (("input_ids", "labels"), ("refusal_input_ids", "refusal_labels")):
        for column in (ids, labels):
            if column not in row and column != "input_ids":
                continue
            value = row.get(column)
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise TypeError(f"Column `{column}` in {where} is a {_type(value)}: it must be a list of integers.")
        if labels in row and len(row[labels]) != len(row.get(ids) or []):
            raise ValueError(
                f"`{labels}` has {len(row[labels])} entries and `{ids}` {len(row.get(ids) or [])} in {where}: "
                "one label per token is needed, -100 where a token is no target."
            )


def _type(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"list of {type(value[0]).__name__}"
    return "empty list" if value == [] else type(value).__name__


def to_dataset(dataset: Dataset | IterableDataset | list, fmt: str, role: str, *, has_template: bool) -> Any:
    """Turns a list of dicts into a `datasets.Dataset`. Checks the rows first: Arrow's own errors name no row."""
    if not isinstance(dataset, list):
        return dataset.with_format(None)  # rows as Python lists, even if the user had set another format
    for index, row in enumerate(dataset):
        check_row(row, index, fmt, role, has_template=has_template)
        if row.keys() != dataset[0].keys():  # Arrow would silently drop columns that the first row lacks
            raise ValueError(
                f"Row {index} of the `{role}` dataset has the columns {sorted(row)}, row 0 has {sorted(dataset[0])}: "
                "all rows of a list must have the same ones."
            )
    return datasets.Dataset.from_list([dict(row) for row in dataset])
