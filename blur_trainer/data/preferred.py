"""The answers that are preferred to a forget answer: a refusal, or the alternatives that a row gives."""

import random
from collections.abc import Mapping
from typing import Any

from blur_trainer.data.refusals import REFUSALS
from blur_trainer.data.rows import is_blank


def preferred_answers(row: Mapping[str, Any], index: int, role: str, seed: int, alternatives: bool) -> list[str]:
    """
    The texts that take the answer's place in one row.

    Args:
        row, index, role: the row, its position and its dataset's name, the latter two for messages.
        seed: of the drawn refusal.
        alternatives: the texts of the column `alternative`, a string or a list of strings. Otherwise one refusal: that
            of the column `refusal`, else one drawn from the seed and the row index, equal in every process.

    Raises:
        `TypeError`, `ValueError`: the column holds something else, or nothing.
    """
    column = "alternative" if alternatives else "refusal"
    if column not in row:
        return [random.Random(f"{seed}-{index}").choice(REFUSALS)]
    given = row[column]
    texts = given if alternatives and isinstance(given, list) else [given]
    where = f"Column `{column}` in row {index} of the `{role}` dataset"
    for text in texts:
        if not isinstance(text, str):
            accepted = "a string or a list of strings" if alternatives else "a string"
            raise TypeError(f"{where} {_kind(text, given)}: it must be {accepted}.")
        if is_blank(text):
            raise ValueError(f"{where} is empty: fill it.")
    if not texts:
        raise ValueError(f"{where} is an empty list: give an answer, or leave the row out.")
    return texts


def _kind(text: Any, given: Any) -> str:
    return f"is a {type(text).__name__}" if text is given else f"holds a {type(text).__name__}"
