"""The forget set's column `forget_level`: how well a model may know a row that never saw it, in nats per token."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from blur_trainer.data.columns import LEVEL
from blur_trainer.data.sources import check_dataset, column_names


def has_levels(dataset: Any, role: str) -> bool:
    check_dataset(dataset, role)
    return LEVEL in column_names(dataset)


def check_levels(columns: Sequence[str], role: str, levels: bool) -> None:
    """Raises `ValueError` if levels are wanted and there are none."""
    if levels and LEVEL not in columns:
        raise ValueError(
            f"The forget objective reads a level for each example, but the `{role}` dataset has no column `{LEVEL}`: "
            "give one level for all (`forget_level=4.5`, nats per token), or fill the column, by "
            "`blur_trainer.Level` or yourself."
        )


def row_level(row: Mapping[str, Any], index: int, role: str) -> float:
    """The level of a row. Raises `TypeError` or `ValueError` if it is no finite number above 0."""
    value = row[LEVEL]
    where = f"Column `{LEVEL}` in row {index} of the `{role}` dataset"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{where} is a {type(value).__name__}: it must be a number, nats per answer token.")
    level = float(value)
    if not (math.isfinite(level) and level > 0):
        raise ValueError(f"{where} is {level!r}: it must be finite and above 0, nats per answer token.")
    return level
