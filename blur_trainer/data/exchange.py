"""Answers exchanged between questions: what a model says of an answer that does not belong to its question."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: format -> the column with the answer
_ANSWER = {"question-answer": "answer", "prompt-completion": "completion", "messages": "messages"}


def exchanged_rows(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int], fmt: str, role: str) -> list[dict]:
    """
    Each row with the answer of another question, the nearest in length that says something else.

    Args:
        rows: in the format `fmt`, with questions.
        lengths: of the answers, in tokens.

    Raises:
        `ValueError`: the format has no questions, or all answers are the same.
    """
    if fmt not in _ANSWER:
        raise ValueError(
            f"Answers can be exchanged between questions only, and the `{role}` dataset is in the `{fmt}` format: give "
            "`question`+`answer`, `prompt`+`completion` or `messages`, or take the level from unseen text."
        )
    answers = [_answer(row, fmt) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    made: list[dict] = [{} for _ in rows]
    for place, index in enumerate(order):
        nearest = _by_distance(order, lengths, place)
        donor = next((other for other in nearest if answers[other] != answers[index]), None)
        if donor is None:
            raise ValueError(
                f"Row {index} of the `{role}` dataset has no other row with another answer ({len(rows)} rows): nothing "
                "can be exchanged. Give more rows, or take the level from unseen text."
            )
        column = _ANSWER[fmt]
        given = rows[donor][column]
        if fmt == "messages":
            given = [*rows[index]["messages"][:-1], given[-1]]
        made[index] = {**rows[index], column: given}
    return made


def _by_distance(order: Sequence[int], lengths: Sequence[int], place: int) -> Iterator[int]:
    """The other rows by the distance of their lengths, of equal ones the shorter first. `order`: rows by length."""
    below, above = place - 1, place + 1
    here = lengths[order[place]]
    while below >= 0 or above < len(order):
        shorter = here - lengths[order[below]] if below >= 0 else math.inf
        longer = lengths[order[above]] - here if above < len(order) else math.inf
        if shorter <= longer:
            yield order[below]
            below -= 1
        else:
            yield order[above]
            above += 1


def _answer(row: Mapping[str, Any], fmt: str) -> Any:
    given = row[_ANSWER[fmt]]
    return given[-1]["content"] if fmt == "messages" else given
