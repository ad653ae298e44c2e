"""Describes the numbers of a run in plain sentences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from blur_trainer.report.tables import cells, goal_of, heading, role_of, shorten, spread_texts, values

Items = Sequence[Mapping[str, Any]]
SPELLED_OUT = 3
MOST_METRICS = 8


def read_results(columns: Items, rows: Items, first: Sequence[str] = ()) -> list[str]:
    """
    Describes each unlearned row: what fell, what was kept, what should be zero.

    Args:
        columns: columns of metrics.json. Goal and role decide how a metric is described. Metrics that should fall, and
            all of the forget set, are compared with the retrained model. Metrics to keep are a share of the target's.
        rows: rows of metrics.json. The first of kind "target" and the first of kind "retrain" are compared with.
        first: if there are more than eight columns, only these are described (also as `x_log10`). None: all.

    Returns:
        One text per row of kind "unlearned": at most three, then the number of further rows. If there are several, each
        text starts with the name of its row.
    """
    unlearned = [i for i, row in enumerate(rows) if row.get("kind") == "unlearned"]
    target = next((i for i, row in enumerate(rows) if row.get("kind") == "target"), None)
    retrain = next((i for i, row in enumerate(rows) if row.get("kind") == "retrain"), None)
    shown = {name.removesuffix("_log10") for name in first} | set(first)
    if len(columns) > MOST_METRICS:
        columns = [column for column in columns if column["name"] in shown] or columns
    sentences = []
    for i in unlearned[:SPELLED_OUT]:
        found = [_moved(column, rows, i, target, retrain) for column in columns if _is_to_forget(column)]
        found.append(_kept([c for c in columns if goal_of(c) == "max" and not _is_to_forget(c)], rows, i, target))
        found += [_moved(column, rows, i, target, None) for column in columns if goal_of(column) == "zero"]
        text = " ".join(sentence for sentence in found if sentence)
        if text:
            sentences.append(f"{shorten(rows[i]['name'], 60)}: {text}" if len(unlearned) > 1 else text)
    if len(unlearned) > SPELLED_OUT:
        sentences.append(f"{len(unlearned) - SPELLED_OUT} more unlearned models are in the table.")
    return sentences


def read_sweep(metrics: Mapping[str, Any]) -> list[str]:
    """The verdicts of a sweep over strengths, one sentence per reading; none for other runs."""
    readings = (metrics.get("footing") or {}).get("readings") or []
    return [
        f"{reading['title']}. " + "; ".join(f"{v['column']}: {v['text']}" for v in reading["verdicts"]) + "."
        for reading in readings
        if reading.get("verdicts")
    ]


def _label(column: Mapping[str, Any]) -> str:
    return heading({**column, "goal": None})


def _is_to_forget(column: Mapping[str, Any]) -> bool:
    """Whether a metric measures forgetting. Forget quality should rise, but a share of the target's says nothing."""
    return goal_of(column) in ("min", "near") or (goal_of(column) == "max" and role_of(column) == "forget")


def _moved(column: Mapping[str, Any], rows: Items, i: int, target: int | None, retrain: int | None) -> str:
    """ "VerbMem forget went from 100.0 to 21.3; the retrained model has 22.0." """
    parts, numbers = zip(cells(column, rows), spread_texts(column, rows), strict=True), values(column, rows)
    texts = [" ".join(part for part in pair if part) for pair in parts]
    if numbers[i] is None:
        return ""
    start = "" if target is None or numbers[target] is None else f"went from {texts[target]} to "
    text = f"{_label(column)} {start or 'is '}{texts[i]}"
    if retrain is not None and numbers[retrain] is not None:
        return f"{text}; the retrained model has {texts[retrain]}."
    near = column.get("near") if goal_of(column) == "near" else 0 if goal_of(column) == "zero" else None
    return f"{text}." if near is None else f"{text}; the aim is {near:.3g}."


def _kept(columns: Items, rows: Items, i: int, target: int | None) -> str:
    """ "VerbMem retain kept 92.0 % and KnowMem retain 98.2 % of the target's." """
    parts: list[str] = []
    others: list[str] = []
    for column in columns:
        numbers = values(column, rows)
        now, before = numbers[i], None if target is None else numbers[target]
        if now is not None and before is not None and 0 < before < math.inf and math.isfinite(100 * now / before):
            parts.append(f"{_label(column)}{'' if parts else ' kept'} {100 * now / before:.1f} %")
        else:
            others.append(_moved(column, rows, i, target, None))
    if parts:
        listed = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
        others.insert(0, f"{listed} of the target's.")
    return " ".join(other for other in others if other)


def read_training(state: Mapping[str, Any]) -> list[str]:
    """Describes the training log: its length, how often the gradients disagreed, and what went wrong."""
    history = state.get("log_history") or []
    sentences = []
    if state.get("global_step"):
        epochs = f" ({state['epoch']:.1f} epochs)" if _finite(state.get("epoch")) else ""
        sentences.append(f"Training took {state['global_step']} steps{epochs}.")
    cosines = [entry["grad/cosine"] for entry in history if _finite(entry.get("grad/cosine"))]
    if cosines:
        share = 100 * sum(cosine < 0 for cosine in cosines) / len(cosines)
        sentences.append(f"The two gradients disagreed (cosine below 0) at {share:.0f} % of the logged steps.")
    return sentences


def find_faults(state: Mapping[str, Any], columns: Items, rows: Items) -> list[str]:
    """Warnings for the reader: skipped steps, values that are not finite."""
    history = state.get("log_history") or []
    faults = []
    skipped = sum(entry["grad/skipped"] for entry in history if _finite(entry.get("grad/skipped")))
    if skipped:
        faults.append(f"Steps skipped because a gradient was not finite: {skipped:.0f}.")
    for key in ("loss", "loss/forget", "loss/retain"):
        logged = [entry[key] for entry in history if isinstance(entry.get(key), (int, float))]
        bad = sum(not math.isfinite(value) for value in logged)
        if bad:
            faults.append(f"{key} was not finite in {bad} of {len(logged)} log entries.")
    for column in columns:
        for row, number in zip(rows, values(column, rows), strict=True):
            if number is not None and not math.isfinite(number):
                faults.append(f"{_label(column)} of {row['name']} is not finite.")
    return faults


def _finite(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
