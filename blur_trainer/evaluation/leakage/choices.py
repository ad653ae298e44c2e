"""Multiple-choice questions without their choices."""

from collections.abc import Mapping
from typing import Any

from blur_trainer.data.sources import column_names

_COLUMNS = {"question", "choices", "answer"}


def opened(rows: Any) -> Any:
    """
    Rows of `question`, `choices` and the right one's index become questions with the right choice's text as answer.
    Other rows stay as they are. Raises `ValueError` for an index that no choice has.
    """
    if not set(column_names(rows)) >= _COLUMNS:
        return rows
    return [_opened(index, row) for index, row in enumerate(rows)]


def _opened(index: int, row: Mapping[str, Any]) -> dict[str, str]:
    choices, right = row["choices"], row["answer"]
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise ValueError(
            f"Row {index} of the `forget` rows that are measured has {len(choices)} choices and the answer {right!r}: "
            "it is the index of the right choice, from 0."
        )
    return {"question": row["question"], "answer": choices[right]}
