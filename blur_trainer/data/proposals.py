"""What a user is told of columns that could not be recognized: the options that decide, to be copied."""

from collections.abc import Mapping, Sequence
from typing import Any

_ANSWERS = ("answer", "response", "completion", "output", "target", "reply", "assistant", "solution")
_SHOWN = 5  # so many proposals


def ambiguous(readings: Sequence[Mapping[str, str]], columns: Sequence[str], role: str, name: str) -> str:
    return (
        f"{name} has the columns {list(columns)}, and more than one reading is possible. Choose by `columns`, on the "
        f"command line {_options(readings, role)}."
    )


def unknown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], role: str, name: str) -> str:
    """Names what could be meant: a pair of columns that hold words, or one of them as text."""
    worded = [column for column in columns if any(_has_words(row.get(column)) for row in rows)]
    ends = [column for column in worded if any(word in column.casefold() for word in _ANSWERS)]
    if len(worded) == 1:
        readings = [{"text": worded[0]}]
    elif ends:
        readings = [{"prompt": start, "completion": end} for end in ends for start in worded if start not in ends]
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
