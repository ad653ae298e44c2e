"""How a metric is written: its arrow, its digits, and the plain-text table at the end of a run.

`columns` and `rows` are those of `metrics.json`:

    columns  [{"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min" | "max" | "zero"}, ...]
    rows     [{"name": "target", "kind": "target", "metrics": {"forget_verbmem": 100.0, ...}}, ...]

A column may have a `role`, "forget" or "retain" (see `role_of`). A row that is the mean over several runs has their
number as `runs` and `{metric name: standard deviation}` as `spread`.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from blur_trainer.constants import ROLES

MISSING = "—"
ARROWS = {"min": "↓", "max": "↑", "zero": "→0"}
GAP = "  "
SHORTEST_NAME = 12


def as_number(value: Any) -> float | None:
    """`value` as a float, `None` for a missing one. NaN and infinities are numbers: they are a result, too."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"A metric must be a number or None, but got {value!r} of type {type(value).__name__}. "
            "Call `.item()` on tensors and leave out metrics that were not computed."
        )
    return float(value)


def goal_of(column: Mapping[str, Any]) -> str | None:
    """The direction in which a column improves: "min", "max", "zero", or `None` where it has none."""
    goal = column.get("goal")
    if goal is not None and goal not in ARROWS:
        raise ValueError(f"The goal of column {column['name']!r} must be one of {sorted(ARROWS)}, but got {goal!r}.")
    return goal


def role_of(column: Mapping[str, Any]) -> str | None:
    """
    What a column is about: "forget" (the aim is the retrained model's value), "retain" (the aim is the target's), or
    `None` where neither is known. The key `role`, or else the name: `forget_quality` is of the forget set; of the
    others, what should be high should be kept.
    """
    role = column.get("role")
    if role is not None and role not in ROLES:
        raise ValueError(f"The role of column {column['name']!r} must be one of {list(ROLES)}, but got {role!r}.")
    if role is None and str(column["name"]).startswith("forget_"):
        return "forget"
    return role or ("retain" if goal_of(column) == "max" else None)


def heading(column: Mapping[str, Any]) -> str:
    """The label of a column followed by its arrow, on one line."""
    goal = goal_of(column)
    label = " ".join(str(column.get("label") or column["name"]).split())
    return f"{label} {ARROWS[goal]}" if goal else label


def column_of(name: str, columns: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The column of this name. Of `x_log10`, which no table shows beside `x`: that of `x`, said to be a logarithm."""
    known = {column["name"]: column for column in columns}
    base = known.get(name.removesuffix("_log10"))
    if name in known or base is None:
        return known.get(name, {"name": name})
    return {**base, "name": name, "label": f"log10 {base.get('label') or base['name']}"}


def values(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The numbers of one column, one per row."""
    return [as_number((row.get("metrics") or {}).get(column["name"])) for row in rows]


def robustness_columns(
    columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The columns that any of the rows has a value of; all their metrics, where `columns` names none of them."""
    names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
    return [column for column in columns if column["name"] in names] or [{"name": name} for name in names]


def first_of_kind(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The first row of this kind, as a list; an empty one where there is none."""
    return [row for row in rows if row.get("kind") == kind][:1]


def robustness_rows(robustness: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> list[Mapping[str, Any]]:
    """
    The rows of a table of attacks: each attack and the end of each relearning, between the target and the retrained
    model, so that one sees how far what was forgotten came back.

    Args:
        robustness: what [`~blur_trainer.evaluation.robustness.battery.robustness`] found.
        rows: those of `metrics.json`, where the target and the retrained model are.
    """
    ends = [
        {"name": f"relearned {curve.get('name', '')}, {last['steps']} steps", "metrics": last.get("metrics")}
        for curve in robustness.get("relearning") or []
        for last in curve["points"][-1:]
    ]
    attacked = [*(robustness.get("attacks") or []), *ends]
    return [*first_of_kind(rows, "target"), *attacked, *first_of_kind(rows, "retrain")] if attacked else []


def spreads(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The standard deviations of one column, one per row; `None` where a row is a single run."""
    return [as_number((row.get("spread") or {}).get(column["name"])) for row in rows]


def decimals(numbers: Sequence[float | None]) -> int:
    """One decimal; three where the whole column lies within [-1, 1], as probabilities and AUCs do."""
    sizes = [abs(number) for number in numbers if number is not None and math.isfinite(number)]
    return 3 if sizes and 0 < max(sizes) <= 1 else 1


def format_number(number: float | None, digits: int = 1) -> str:
    """`number` with `digits` decimals, an em dash for `None`; scientific for small p-values and huge numbers."""
    if number is None:
        return MISSING
    vanishing = digits > 1 and 0 < abs(number) < 0.5 * 10.0**-digits
    if math.isfinite(number) and (vanishing or abs(number) >= 1e7):
        return f"{number:.1e}"
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if text.strip("-0.") == "" else text


def cells(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of one column, one per row, with the same number of decimals."""
    numbers = values(column, rows)
    digits = decimals(numbers)
    return [format_number(number, digits) for number in numbers]


def spread_texts(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """ "± 0.031" with the decimals of the column, scientific where the mean is; empty where a row is a single run."""
    texts = []
    digits = decimals(values(column, rows))
    for mean, spread in zip(cells(column, rows), spreads(column, rows), strict=True):
        scientific = "e" in mean or (spread is not None and 1e7 <= spread < math.inf)
        text = "" if spread is None else f"{spread:.1e}" if scientific else f"{spread:.{digits}f}"
        texts.append(f"± {text}" if text else "")
    return texts


def _full_cells(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean and spread; room for the spread also where there is none, so that the means stand below each other."""
    extra = spread_texts(column, rows)
    room = max([len(text) for text in extra], default=0)
    return [f"{text} {more:>{room}}" if room else text for text, more in zip(cells(column, rows), extra, strict=True)]


def wrap_heading(head: str, narrow: int) -> list[str]:
    """The heading in lines as short as its longest word allows; a no-break space keeps the arrow with the last word."""
    words, _, last = head.rpartition(" ")
    if last in ARROWS.values():
        head = f"{words}\N{NO-BREAK SPACE}{last}"
    limit = max([narrow, *(len(word) for word in head.split(" "))])
    lines = textwrap.wrap(head, limit, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def shorten(text: str, length: int) -> str:
    """`text` on one line and in at most `length` characters; what is cut is the middle: runs differ at the ends."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]


def format_table(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], width: int = 100) -> str:
    """
    The results of a run as plain text: one line per row, numbers aligned right, an em dash for what is missing, and
    "0.620 ± 0.031" in a row that is the mean over several runs.

    A table wider than `width` gets headings of several lines; if that is not enough, shorter row names.

    Args:
        columns: name, label and goal ("min", "max", "zero") of each metric, in the order to print.
        rows: name and metrics of each model, in the order to print.
        width: the number of characters that a line should not exceed.

    Example:

    >>> columns = [{"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"}]
    >>> print(format_table(columns, [{"name": "target", "metrics": {"forget_verbmem": 99.96}}]))
            VerbMem forget ↓
    ------  ----------------
    target             100.0
    """
    texts = [_full_cells(column, rows) for column in columns]
    names = [" ".join(str(row["name"]).split()) for row in rows]
    name_width = max([len(name) for name in names], default=0)

    def total(heads: list[list[str]]) -> int:
        return name_width + sum(len(GAP) + size for size in _sizes(heads, texts))

    heads = [[heading(column)] for column in columns]
    if total(heads) > width:
        heads = [
            wrap_heading(head[0], max([len(text) for text in column], default=1))
            for head, column in zip(heads, texts, strict=True)
        ]
    excess = total(heads) - width
    if excess > 0:
        name_width = max(min(SHORTEST_NAME, name_width), name_width - excess)
    return _layout(heads, texts, [shorten(name, name_width) for name in names], name_width)


def _sizes(heads: list[list[str]], texts: list[list[str]]) -> list[int]:
    return [max(len(text) for text in [*head, *column]) for head, column in zip(heads, texts, strict=True)]


def _layout(heads: list[list[str]], texts: list[list[str]], names: list[str], name_width: int) -> str:
    sizes = _sizes(heads, texts)
    height = max([len(head) for head in heads], default=1)
    padded = [[""] * (height - len(head)) + head for head in heads]
    lines = [
        [" " * name_width, *(head[i].rjust(size) for head, size in zip(padded, sizes, strict=True))]
        for i in range(height)
    ]
    lines.append(["-" * name_width, *("-" * size for size in sizes)])
    for i, name in enumerate(names):
        lines.append([name.ljust(name_width), *(text[i].rjust(size) for text, size in zip(texts, sizes, strict=True))])
    return "\n".join(GAP.join(line).rstrip() for line in lines)
