"""Column names that people have -> the parts of a row that training reads. What could mean two things is refused."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from blur_trainer.data.columns import LEVEL, columns_read, find_format
from blur_trainer.data.proposals import ambiguous, lost, unknown

#: part of a row -> the names of columns that hold it, in lower case with `_` for blanks
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "input", "inputs"),
    "question": ("question", "query", "instruction", "problem", "q"),
    "completion": (
        "completion",
        "response",
        "output",
        "outputs",
        "answer",
        "answers",
        "target",
        "targets",
        "reply",
        "a",
    ),
    "context": ("context", "passage"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue"),
    "text": ("text", "content", "body", "document", "passage", "article"),
}
#: Pairs whose first name alone says nothing: a source is a book, a user is a person.
_PAIRS = {"source": ("target", "targets"), "user": ("assistant",), "human": ("assistant", "gpt", "bot")}
# Beside a text these may be its answer, unless they are numbers; beside a question all but the target are left out.
_LABELS = ("label", "labels", "summary", "highlights", "target", "targets")
_PREFERENCES = ("chosen", "rejected")
# Columns without which a row would say something else, and what they hold.
_CHOICES = ("choices", "options", "endings", "option_a", "choice_a", "option1", "choice1", "b")
_REFUSED = {**dict.fromkeys(_CHOICES, "choices"), "history": "turns"}
#: Columns that go along as they are.
BESIDE = ("refusal", "alternative", "tools", "chat_template_kwargs", LEVEL)

#: What an override may name. `answer` is another word for `completion`.
PARTS = ("prompt", "question", "completion", "answer", "context", "system", "messages", "text", "input_ids", *BESIDE)

Parts = dict[str, str]  # part of a row -> the column that holds it


def recognize(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], role: str, name: str) -> Parts:
    """
    The parts of the rows, by the names of the columns.

    Args:
        columns, rows: of the table.
        role, name: of the dataset, for messages.

    Raises:
        `ValueError`: nothing is recognized, or two readings are possible. It proposes the option that decides.
    """
    named = by_name(columns, name)
    beside = {part: named[part] for part in BESIDE if part in named}
    if "input_ids" in named:
        find_format(columns, role)
        return {column: column for column in columns_read("input_ids", columns)}
    named = {n: c for n, c in named.items() if n not in BESIDE}
    # A column without anything in it means nothing, unless there is no other.
    in_use = {n: c for n, c in named.items() if any(filled(row.get(c)) for row in rows)}
    readings = _readings(in_use, rows) or _readings(named, rows)
    refused = [n for n in _REFUSED if n in in_use]
    if refused and (not readings or any("completion" in reading for reading in readings)):
        raise ValueError(lost(named[refused[0]], _REFUSED[refused[0]], readings, role, name))
    if not readings:
        raise ValueError(unknown(columns, rows, role, name))
    if len(readings) > 1:
        raise ValueError(ambiguous(readings, columns, role, name))
    return readings[0] | beside


def by_name(columns: Iterable[str], where: str) -> dict[str, str]:
    """Column by its name in lower case, without blanks around. Two that are read under one name are an error."""
    named: dict[str, str] = {}
    known = {*PARTS, *(name for names in NAMES.values() for name in names)}
    for column in columns:
        key = simple(column)
        if key in named and key in known:
            raise ValueError(f"{where} has the columns {named[key]!r} and {column!r}: rename one of them.")
        named[key] = column
    return named


def simple(name: str) -> str:
    return str(name).strip().casefold().replace(" ", "_").replace("-", "_")


def filled(value: Any) -> bool:
    """Whether a cell holds anything."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return bool(value.strip()) if isinstance(value, str) else value not in ([], {})


def _readings(named: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[Parts]:
    """All that the columns could mean. One reading is clear."""
    conversations = [n for n in NAMES["messages"] if n in named]
    answered = [n for n in NAMES["completion"] if n in named]
    preferred = [n for n in _PREFERENCES if n in named]
    asked, contexts = _asked(named)
    texts = [n for n in NAMES["text"] if n in named and n not in contexts]
    system = [{"system": named[n]} for n in NAMES["system"] if n in named] or [{}]
    pairs = list(product(asked, [*answered, *preferred]))
    if not pairs:
        pairs = [
            (n, end)
            for first, ends in _PAIRS.items()
            for end in ends
            if {first, end} <= set(named)
            for n in (first, *asked)
        ]
    found: list[Parts] = [_pair(*pair, context, named) for pair in pairs for context in contexts or [""]]
    if "input" in asked:  # beside another question it may be that one's context
        found = [_pair(n, end, "input", named) for n, end in pairs if n != "input"] + found
    found += [{"messages": named[n]} for n in conversations]
    if conversations and not pairs:  # a prompt beside messages is their first one; an answer beside them is not
        found += [{"prompt": named[n], "completion": named[end]} for n in conversations for end in answered]
    found = [parts | more for parts in found for more in system]
    found += [{"text": named[n]} for n in texts]
    if texts and not pairs:
        labels = [n for n in _LABELS if n in named and not _numbers(named[n], rows)]
        ends = [n for n in answered if n not in _LABELS] + labels
        found += [{"prompt": named[n], "completion": named[end]} for n in texts for end in ends]
        found += [{"prompt": named[n], "completion": named[text]} for n in asked for text in texts]
    if not pairs:
        part = "messages" if any(isinstance(row.get(named[n]), list) for n in preferred for row in rows) else "text"
        found += [{part: named[n]} for n in preferred]
    return found


def _asked(named: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """
    The columns that ask, and those that belong to a question.

    `input` belongs to an `instruction` (Alpaca), a `context` or a `passage` to whatever is asked.
    """
    asked = [n for n in (*NAMES["prompt"], *NAMES["question"]) if n in named]
    contexts = [n for n in NAMES["context"] if n in named and asked]
    if {"input", "instruction"} <= set(asked):
        asked.remove("input")
        contexts.append("input")
    return asked, contexts


def _pair(first: str, second: str, context: str, named: Mapping[str, str]) -> Parts:
    found = {"question" if first in NAMES["question"] else "prompt": named[first]}
    return found | ({"context": named[context]} if context else {}) | {"completion": named[second]}


def _numbers(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column has numbers only, such as the labels of classes."""
    return all(_is_number(row.get(column)) for row in rows if filled(row.get(column)))


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def override(given: str | Mapping[str, str], columns: Sequence[str], role: str, name: str) -> Parts:
    """
    The parts that the user names, such as `prompt=question,completion=response` or the same as a mapping.

    Raises `ValueError` for a part or a column that there is not, and for parts that make no row.
    """
    option = f"`columns` (`--{role}_columns`)"
    chosen = dict(given) if isinstance(given, Mapping) else _split(given, option)
    by_simple = {simple(column): column for column in columns}
    parts: Parts = {part: by_simple[part] for part in BESIDE if part in by_simple}
    for part, column in chosen.items():
        if part not in PARTS:
            raise ValueError(f"{option} names the part {part!r}: the parts are {', '.join(PARTS)}.")
        if column not in columns and simple(column) not in by_simple:
            raise ValueError(f"{option} names the column {column!r}, and {name} has {list(columns)}.")
        parts["completion" if part == "answer" else part] = column if column in columns else by_simple[simple(column)]
    kinds = {"prompt", "question", "messages", "text", "input_ids"} & set(parts)
    paired = bool(kinds & {"prompt", "question"})
    stray = ("context" in parts and not paired) or ("system" in parts and bool(kinds & {"text", "input_ids"}))
    if "input_ids" in kinds:
        parts |= {column: column for column in columns_read("input_ids", columns) if column != "input_ids"}
    if len(kinds) != 1 or paired != ("completion" in parts) or stray:
        raise ValueError(
            f"{option} is {given!r}: name a `prompt` (or `question`) and its `completion`, or `messages`, or `text`, "
            "or `input_ids`. A `context` goes with a question, a `system` with a question or with messages."
        )
    return parts


def _split(given: str, option: str) -> dict[str, str]:
    pairs = [entry.split("=", 1) for entry in given.split(",")]
    if any(len(pair) != 2 or not all(side.strip() for side in pair) for pair in pairs):
        raise ValueError(f"{option} is {given!r}: write PART=COLUMN,PART=COLUMN, such as prompt=question,answer=reply.")
    return {part.strip(): column.strip() for part, column in pairs}


__all__ = ["BESIDE", "NAMES", "PARTS", "Parts", "by_name", "filled", "override", "recognize", "simple"]
