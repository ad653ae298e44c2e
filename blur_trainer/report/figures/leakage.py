"""Figure of leak@k: how likely one of k samples gives the forget set away, for each model."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter

from blur_trainer.evaluation.leakage.estimates import at_k
from blur_trainer.report.figures.spoken import MOST, say_rows
from blur_trainer.report.figures.style import MARKERS, Drawing, Theme, add_legend, new_figure, over_runs, row_colors
from blur_trainer.report.tables import spreads, values

Items = Sequence[Mapping[str, Any]]
BOUND = "leak_bound"
LINES = {"target": "--", "retrain": ":"}


def draw_leakage(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws leak@k over k, one line per row, shaded up to the bound. `None` with fewer than two k."""
    curve, rows = leak_columns(metrics), metrics.get("rows") or []
    drawn = [row for row in rows if any(map(math.isfinite, _heights(curve, row)))]
    if len(curve) < 2 or not drawn:
        return None
    figure, (ax,) = new_figure(theme, 3.8)
    colors = dict(zip(map(id, rows), row_colors(rows, theme), strict=True))
    handles = [_line(ax, curve, row, colors[id(row)], MARKERS[place % len(MARKERS)]) for place, row in enumerate(drawn)]
    ks = list(curve)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("k, samples of each question")
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    add_legend(figure, handles, [row["name"] for row in drawn], theme)
    caption = _caption(metrics.get("columns") or [], drawn)
    return Drawing("leakage", "What sampling brings back", caption, figure, _numbers(metrics, curve, drawn))


def leak_columns(metrics: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """k -> the column of leak@k, in rising order."""
    found = {}
    for column in metrics.get("columns") or []:
        if match := re.fullmatch(r"leak@([1-9]\d*)", str(column["name"])):
            found[int(match[1])] = column
    return dict(sorted(found.items()))


def without_curve(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without those of the curve, if there is one: the same numbers as bars would hide the others."""
    curve = [column["name"] for column in leak_columns(metrics).values()]
    left_out = [*curve, BOUND] if len(curve) > 1 else []
    columns = [column for column in metrics.get("columns") or [] if column["name"] not in left_out]
    return {**metrics, "columns": columns}


def _line(ax: Axes, curve: Mapping[int, Any], row: Mapping[str, Any], color: str, marker: str) -> Any:
    ks, heights = list(curve), _heights(curve, row)
    style = LINES.get(row.get("kind", ""), "-")
    (line,) = ax.plot(ks, heights, color=color, linestyle=style, marker=marker, markersize=5, clip_on=False)
    bound = _bound(row)
    if bound is not None:
        highest = [at_k(bound, k) for k in ks]
        ax.fill_between(ks, heights, highest, color=color, alpha=0.13, linewidth=0)
    errors = [spread or 0.0 for column in curve.values() for spread in spreads(column, [row])]
    if any(map(math.isfinite, errors)) and any(errors):
        ax.errorbar(ks, heights, errors, fmt="none", ecolor=color, elinewidth=1, capsize=2)
    return line


def _bound(row: Mapping[str, Any]) -> float | None:
    """The row's bound of leak@1. A mean of bounds over several runs is none."""
    (bound,) = values({"name": BOUND}, [row])
    return bound if bound is not None and 0 <= bound <= 1 and not row.get("spread") else None


def _caption(columns: Items, rows: Items) -> str:
    kinds = {row.get("kind") for row in rows}
    sentences = ["How likely one of k sampled answers gives the true one away, mean over the questions."]
    if any(_bound(row) is not None for row in rows):
        label = next((column.get("label") or BOUND for column in columns if column["name"] == BOUND), BOUND)
        sentences.append(f'Shaded: what the samples do not rule out, by "{label}".')
    if "target" in kinds:
        sentences.append("Dashed: the model before unlearning.")
    if "retrain" in kinds:
        sentences.append("Dotted: the model that never saw the forget set.")
    if over_runs(rows):
        sentences.append(f"With bars of error: {over_runs(rows)}.")
    return " ".join(sentences)


def _numbers(metrics: Mapping[str, Any], curve: Mapping[int, Mapping[str, Any]], rows: Items) -> str:
    bound = [column for column in metrics.get("columns") or [] if column["name"] == BOUND]
    places = np.linspace(0, len(curve) - 1, min(len(curve), MOST - len(bound))).round().astype(int)
    columns = list(curve.values())
    return say_rows([*(columns[place] for place in places), *bound], rows)


def _heights(curve: Mapping[int, Mapping[str, Any]], row: Mapping[str, Any]) -> list[float]:
    """The heights; NaN (a gap) for missing or infinite values."""
    numbers = [number for column in curve.values() for number in values(column, [row])]
    return [number if number is not None and math.isfinite(number) else math.nan for number in numbers]
