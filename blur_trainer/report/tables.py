"""Formats metrics: arrows, digits, and the plain-text table at the end of a run.

`columns` and `rows` are those of `metrics.json`:

    columns  [{"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min" | "max" | "zero" | "near"}, ...]
    rows     [{"name": "target", "kind": "target", "metrics": {"forget_verbmem": 100.0, ...}}, ...]

A column whose goal is "near" may have the best value, `near`; else that is the retrained model's. A column may have a
`role`, "forget" or "retain" (see `role_of`). A row that is a mean over several runs has `runs`,
their number, and `spread`, `{metric name: standard deviation}`.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any

from tabulate import SEPARATING_LINE, Line, simple_separated_format, tabulate

from blur_trainer.constants import ROLES

MISSING = "—"
ARROWS = {"min": "↓", "max": "↑", "zero": "→0", "near": "→"}
SHORTEST_NAME = 12
LINES = simple_separated_format("  ")._replace(linebelowheader=Line("", "-", "  ", ""))  # and a line of dashes


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
    """The direction in which a column improves: "min", "max", "zero", "near", or `None` where it has none."""
    goal = column.get("goal")
    if goal is not None and goal not in ARROWS:
        raise ValueError(f"The goal of column {column['name']!r} must be one of {sorted(ARROWS)}, but got {goal!r}.")
    return goal


def role_of(column: Mapping[str, Any]) -> str | None:
    """
    The role of a column: "forget" (aim: the retrained model's value), "retain" (aim: the target's value), or `None` if
    unknown. It is the key `role`, else it follows from name and goal.
    """
    role = column.get("role")
    if role is not None and role not in ROLES:
        raise ValueError(f"The role of column {column['name']!r} must be one of {list(ROLES)}, but got {role!r}.")
    if role is None and str(column["name"]).startswith("forget_"):
        return "forget"
    return role or ("retain" if goal_of(column) == "max" else None)


def arrow_of(column: Mapping[str, Any]) -> str:
    """The arrow of a column: "↓", "↑", "→0", "→8.1" for the goal "near", "→" without a value; "" without a goal."""
    goal, near = goal_of(column), as_number(column.get("near"))
    return (ARROWS[goal] if goal else "") + (f"{near:.3g}" if goal == "near" and near is not None else "")


def best_value(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """What a column with the goal "near" should be: its `near`, else the retrained model's value, if there is one."""
    if column.get("near") is not None:
        return as_number(column["near"])
    return next(iter(values(column, first_of_kind(rows, "retrain"))), None)


def heading(column: Mapping[str, Any]) -> str:
    """The label of a column followed by its arrow, on one line."""
    label = " ".join(str(column.get("label") or column["name"]).split())
    return f"{label} {arrow_of(column)}".rstrip()


def column_of(name: str, columns: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The column of this name. For `x_log10`, which tables do not show: the column of `x`, labelled as a logarithm."""
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
    """The columns for which any row has a value. If `columns` names none of the metrics: all metrics."""
    names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
    return [column for column in columns if column["name"] in names] or [{"name": name} for name in names]


def first_of_kind(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """A list with the first row of this kind; empty if there is none."""
    return [row for row in rows if row.get("kind") == kind][:1]


def robustness_rows(robustness: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> list[Mapping[str, Any]]:
    """
    The rows of a table of attacks: each attack and the end of each relearning, between target and retrained model.

    Args:
        robustness: the result of [`~blur_trainer.evaluation.robustness.battery.robustness`].
        rows: the rows of `metrics.json`, which contain the target and the retrained model.
    """
    ends = [
        {"name": f"relearned {curve.get('name', '')}, {last['steps']} steps", "metrics": last.get("metrics")}
        for curve in robustness.get("relearning") or []
        for last in curve["points"][-1:]
    ]
    attacked = [*(robustness.get("attacks") or []), *ends]
    return [*first_of_kind(rows, "target"), *attacked, *first_of_kind(rows, "retrain")] if attacked else []


def spreads(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The standard deviations of one column, one per row. `None` if a row is a single run."""
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
    """Mean and spread. A missing spread gets blank space, so that the means are aligned."""
    extra = spread_texts(column, rows)
    room = max([len(text) for text in extra], default=0)
    return [f"{text} {more:>{room}}" if room else text for text, more in zip(cells(column, rows), extra, strict=True)]


def wrap_heading(head: str, narrow: int) -> list[str]:
    """Breaks a heading into lines as short as its longest word. A no-break space keeps the arrow at the last word."""
    words, _, last = head.rpartition(" ")
    if last.startswith(tuple(ARROWS.values())):
        head = f"{words}\N{NO-BREAK SPACE}{last}"
    limit = max([narrow, *(len(word) for word in head.split(" "))])
    lines = textwrap.wrap(head, limit, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def shorten(text: str, length: int) -> str:
    """`text` on one line with at most `length` characters. The middle is cut, because names differ at the ends."""
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
        columns: name, label and goal ("min", "max", "zero", "near") of each metric, in the order to print.
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
    heads = [[heading(column)] for column in columns]
    table = _layout(heads, texts, names)
    if _width(table) > width:
        needed = [max([len(text) for text in column], default=1) for column in texts]
        heads = [wrap_heading(head, narrow) for [head], narrow in zip(heads, needed, strict=True)]
        table = _layout(heads, texts, names)
    excess = _width(table) - width
    if excess > 0:
        longest = max([len(name) for name in names], default=0)
        names = [shorten(name, max(SHORTEST_NAME, longest - excess)) for name in names]
        table = _layout(heads, texts, names)
    return table


def _width(table: str) -> int:
    return max(len(line) for line in table.split("\n"))


def _layout(heads: list[list[str]], texts: list[list[str]], names: list[str]) -> str:
    """Headings end right above the dashes, however many lines they have."""
    above = list(zip_longest([""], *(reversed(head) for head in heads), fillvalue=""))[::-1]
    body = zip(names, *texts, strict=True)
    table = tabulate(
        [*above, [SEPARATING_LINE], *body],
        tablefmt=LINES,
        colalign=["left", *["right"] * len(texts)],
        disable_numparse=True,  # the texts are as they are to be shown
        preserve_whitespace=True,
    )
    return "\n".join(line.rstrip() for line in table.split("\n"))
