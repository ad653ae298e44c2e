"""What a user is told of columns that could not be recognized: the options that decide, to be copied."""

from collections.abc import Mapping, Sequence
from typing import Any

_ANSWERS = ("answer", "response", "completion", "output", "target", "reply", "assistant", "solution")
_QUESTIONS = ("question", "prompt", "query", "instruction")
_SHOWN = 5  # so many proposals


def ambiguous(readings: Sequence[dict[str, str]], columns: Sequence[str], role: str, name: str) -> str:
    return (
        f"{name} has the columns {list(columns)}, and more than one reading is possible. Choose by `columns`, on the "
        f"command line {_options(readings, role)}."
    )


def lost(column: str, holds: str, readings: Sequence[dict[str, str]], role: str, name: str) -> str:
    """Of a column without which the rows would say something else."""
    if holds == "choices":
        said = "its rows are multiple choice, where the answer may be the number of a choice. Write the right answer's "
        said += "words into a column, and name it"
        readings = [reading | {"completion": "ANSWER"} for reading in readings if "completion" in reading]
    else:
        said = (
            "it has turns that come before the question, and they are not read. Write conversations as `messages`, or "
        )
        said += "choose to do without them"
    options = _options(readings or [{"prompt": "QUESTION", "completion": "ANSWER"}], role)
    return f"{name} has a column {column!r}: {said} by `columns`, on the command line {options}."


def unknown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], role: str, name: str) -> str:
    """Names what could be meant: a pair of columns that hold words, or one of them as text."""
    worded = [column for column in columns if any(_has_words(row.get(column)) for row in rows)]
    starts = [column for column in worded if any(word in column.casefold() for word in _QUESTIONS)] or worded
    ends = [column for column in worded if any(word in column.casefold() for word in _ANSWERS)]
    if len(worded) == 1:
        readings = [{"text": worded[0]}]
    elif ends:
        readings = [{"prompt": start, "completion": end} for end in ends for start in starts if start not in ends]
    else:
        readings = [{"prompt": worded[0], "completion": worded[1]}, {"text": worded[0]}] if worded else []
    readings = readings or [{"prompt": "QUESTION", "completion": "ANSWER"}]
    headless = " If they are a first row and no names, add a line with names above." if _headless(columns, name) else ""
    return (
        f"{name} has the columns {list(columns)}, which do not say what is asked and what is answered.{headless} Name "
        f"them by `columns`, on the command line {_options(readings, role)}."
    )


def _headless(columns: Sequence[str], name: str) -> bool:
    return any(end in name for end in (".csv", ".tsv")) and any(len(column.split()) > 3 for column in columns)


def _has_words(value: Any) -> bool:
    return isinstance(value, (list, dict)) or (isinstance(value, str) and any(map(str.isalpha, value)))


def _options(readings: Sequence[Mapping[str, str]], role: str) -> str:
    written = [",".join(f"{part}={column}" for part, column in reading.items()) for reading in readings]
    written = [f'"{text}"' if " " in text else text for text in dict.fromkeys(written)]
    return " or ".join(f"`--{role}_columns {text}`" for text in written[:_SHOWN])


__all__ = ["ambiguous", "unknown"]
