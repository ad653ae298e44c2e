"""Figure of relearning: metrics over the steps, with the levels of the target and of the retrained model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from blur_trainer.report.figures.results import by_scale
from blur_trainer.report.figures.spoken import say_rows
from blur_trainer.report.figures.style import MARKERS, Drawing, Theme, add_legend, new_lines, plain, set_title
from blur_trainer.report.tables import first_of_kind, goal_of, heading, robustness_columns, role_of, values

Items = Sequence[Mapping[str, Any]]
MOST_METRICS = 6
PER_LINE = 3
LEVELS = {"target": "--", "retrain": ":"}


def draw_relearning(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws one panel per metric, with one line per relearned set of texts and the levels to compare with."""
    curves = (metrics.get("robustness") or {}).get("relearning") or []
    points = [point for curve in curves for point in curve["points"]]
    found = robustness_columns(metrics.get("columns") or [], points)
    columns = _in_order([c for c in found if any(map(math.isfinite, _heights(c, points)))], metrics.get("plane") or {})
    shown = columns[:MOST_METRICS]
    if not shown:
        return None
    lines = [shown[start : start + PER_LINE] for start in range(0, len(shown), PER_LINE)]
    figure, axes = new_lines(theme, 3.4 if len(lines) == 1 else 2.7, [[1.0] * PER_LINE] * len(lines))
    for ax in axes[len(shown) :]:
        ax.remove()
    drawn: dict[int, Any] = {}
    rows = metrics.get("rows") or []
    for ax, column in zip(axes, shown, strict=False):
        drawn |= _panel(ax, column, curves, rows, theme)
        set_title(ax, plain(heading(column), 40), theme)
        if ax in axes[max(0, len(shown) - PER_LINE) : len(shown)]:
            ax.set_xlabel("steps of fine-tuning")
    _share_scales(axes, shown, [*points, *_levels(rows)])
    items = [*curves, *_levels(rows)]
    named = [(drawn[id(item)], str(item.get("name", ""))) for item in items if id(item) in drawn]
    add_legend(figure, [line for line, _ in named], [name for _, name in named], theme)
    ends = [{**curve["points"][-1], "name": curve.get("name", "")} for curve in curves if curve["points"]]
    numbers = f"At the end. {say_rows(shown, [*ends, *_levels(rows)])}"
    return Drawing("relearning", "Relearning", _caption(curves, _levels(rows), len(columns)), figure, numbers)


def _panel(ax: Axes, column: Mapping[str, Any], curves: Items, rows: Items, theme: Theme) -> dict[int, Any]:
    """Draws one metric. Returns its lines, keyed by the `id` of the curve or row."""
    drawn: dict[int, Any] = {}
    for row in _levels(rows):
        (level,) = _heights(column, [row])
        if math.isfinite(level):
            color = theme.target if row["kind"] == "target" else theme.retrain
            drawn[id(row)] = ax.axhline(level, color=color, linestyle=LEVELS[row["kind"]], linewidth=1.8)
    for number, curve in enumerate(curves):
        steps = [point["steps"] for point in curve["points"]]
        color, marker = theme.methods[number % len(theme.methods)], MARKERS[number % len(MARKERS)]
        if curve.get("kind") == "retrain":
            color = theme.retrain
        heights = _heights(column, curve["points"])
        (line,) = ax.plot(steps, heights, color=color, marker=marker, markersize=5, clip_on=False)
        drawn[id(curve)] = line
    ax.margins(x=0.04, y=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return drawn


def _share_scales(axes: Sequence[Axes], columns: Items, items: Items) -> None:
    """Gives all percentages one scale and all shares one, so that a loss of 5 does not look like one of 100."""
    for scale, group in by_scale(columns, items).items():
        panels = [ax for ax, column in zip(axes, columns, strict=False) if column in group]
        limits = [ax.get_ylim() for ax in panels]
        for ax in panels if scale != "signed" else ():
            ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _levels(rows: Items) -> list[Mapping[str, Any]]:
    return [row for kind in LEVELS for row in first_of_kind(rows, kind)]


def _in_order(columns: Items, plane: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Orders the metrics: first the two of the plane, then forgetting and privacy."""
    first = {name.removesuffix("_log10") for name in plane.values()}

    def rank(column: Mapping[str, Any]) -> int:
        return 0 if column["name"] in first else 1 if role_of(column) == "forget" or goal_of(column) == "zero" else 2

    return sorted(columns, key=rank)


def _caption(curves: Items, levels: Items, count: int) -> str:
    kinds = [row["kind"] for row in levels]
    sentences = ["The unlearned model (step 0), fine-tuned on the texts of the legend."]
    if "target" in kinds:
        sentences.append("The dashed line is the model before unlearning: what jumps there was only hidden.")
    if "retrain" in kinds:
        sentences.append("The dotted line is the model that never saw the forget set.")
    if any(curve.get("kind") == "retrain" for curve in curves):
        sentences.append("What the retrained model learns as fast was not hidden, but learnt.")
    if count > MOST_METRICS:
        sentences.append(f"{MOST_METRICS} of {count} metrics; the end of all is in the table of attacks.")
    return " ".join(sentences)


def _heights(column: Mapping[str, Any], items: Items) -> list[float]:
    """The heights; NaN (a gap) for missing or infinite values."""
    return [n if n is not None and math.isfinite(n) else math.nan for n in values(column, items)]
