"""Figures of the results: bars of metrics by row, and lines over the stages of a sequential protocol."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from blur_trainer.report.figures.spoken import say_rows
from blur_trainer.report.figures.style import (
    MARKERS,
    Drawing,
    Theme,
    add_legend,
    new_figure,
    new_lines,
    over_runs,
    plain,
    row_colors,
    row_hatches,
    set_title,
)
from blur_trainer.report.tables import cells, decimals, goal_of, heading, role_of, spreads, values, wrap_heading

Items = Sequence[Mapping[str, Any]]
BAR_TITLES = {"score": "↓ bars should fall, ↑ bars should stay", "signed": "Should end at 0", "unit": "On a scale of 1"}
LINE = 10  # this many groups of bars, with labels, fit side by side


def draw_bars(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws one group of bars per metric, one bar per row, one panel per scale."""
    rows = metrics.get("rows") or []
    panels = by_scale(metrics.get("columns") or [], rows)
    if not panels:
        return None
    lines = _in_lines(panels)
    figure, axes = new_lines(
        theme, 4.0 if len(lines) == 1 else 3.2, [[len(c) + 0.4 for _, c in line] for line in lines]
    )
    looks = list(zip(row_colors(rows, theme), row_hatches(rows, theme), strict=True))
    for ax, (scale, columns) in zip(axes, itertools.chain(*lines), strict=True):
        _grouped(ax, columns, rows, looks, theme)
        # a panel of one group has no room for a sentence; the arrow must do
        set_title(ax, _bar_title(scale, columns) if len(columns) > 2 else "", theme)
    handles = [axes[0].bar([0], [0], color=c, hatch=h, edgecolor=theme.paper, width=0)[0] for c, h in looks]
    add_legend(figure, handles, [row["name"] for row in rows], theme)
    caption = "Arrows give the direction of each metric. On the forget set the aim is the retrained model, not zero."
    if over_runs(rows):
        caption += f" With bars of error: {over_runs(rows)}."
    shown = [column for columns in panels.values() for column in columns]
    return Drawing("before_after", "Before and after", caption, figure, say_rows(shown, rows))


def _in_lines(panels: Mapping[str, Items]) -> list[list[tuple[str, list[Mapping[str, Any]]]]]:
    """Divides panels into lines of about equally many groups. A long panel continues in the next line."""
    groups = [(scale, column) for scale, columns in panels.items() for column in columns]
    size = math.ceil(len(groups) / math.ceil(len(groups) / LINE))
    lines = [groups[start : start + size] for start in range(0, len(groups), size)]
    return [
        [(scale, [column for _, column in part]) for scale, part in itertools.groupby(line, lambda group: group[0])]
        for line in lines
    ]


def _bar_title(scale: str, columns: Items) -> str:
    """States only what holds for all columns: forget quality should rise, and a logarithm may be negative."""
    goals = {goal_of(column) for column in columns}
    if (scale == "signed" and goals != {"zero"}) or ("near" in goals and scale == "score"):
        return ""
    return "↓ bars should be low, ↑ bars high" if scale == "score" and _should_rise(columns) else BAR_TITLES[scale]


def _should_rise(columns: Items) -> bool:
    return any(goal_of(column) == "max" and role_of(column) == "forget" for column in columns)


def _grouped(ax: Axes, columns: Items, rows: Items, looks: list[tuple[str, str]], theme: Theme) -> None:
    width = 0.82 / len(rows)
    labelled = len(rows) * len(columns) <= 60 and len(rows) <= LINE  # more numbers lie on each other
    for group, column in enumerate(columns):
        numbers, texts, extra = values(column, rows), cells(column, rows), spreads(column, rows)
        for i, (number, text, spread) in enumerate(zip(numbers, texts, extra, strict=True)):
            x = group + (i - (len(rows) - 1) / 2) * width
            height = number if number is not None and math.isfinite(number) else 0.0
            color, hatch = looks[i]
            ax.bar(x, height, width * 0.92, color=color, hatch=hatch, edgecolor=theme.paper, linewidth=0)
            if spread and math.isfinite(spread):
                ax.errorbar(x, height, spread, fmt="none", ecolor=theme.ink, elinewidth=1, capsize=2)
                height += math.copysign(spread, height)
            if labelled:
                below = height < 0
                ax.annotate(
                    text,
                    (x, height),
                    (0, -3 if below else 3),
                    textcoords="offset points",
                    ha="center",
                    va="top" if below else "bottom",
                    rotation=90 if len(rows) > 2 and number is not None else 0,
                    fontsize=7,
                    color=theme.muted,
                )
    ax.axhline(0, color=theme.muted, linewidth=1)
    ax.margins(y=0.16)
    labels = ["\n".join(wrap_heading(plain(heading(column), 40), 12)) for column in columns]
    ax.set_xticks(range(len(columns)), labels)
    ax.set_xlim(-0.6, len(columns) - 0.4)


def draw_stages(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws one line per metric over the stages of a sequential or scaling protocol, one panel per scale."""
    stages = metrics.get("stages") or []
    columns = list(metrics.get("columns") or [])
    known = {column["name"] for column in columns}
    extra = dict.fromkeys(name for stage in stages for name in stage.get("metrics") or {} if name not in known)
    panels = by_scale([*columns, *({"name": name} for name in extra)], stages)
    if not panels:
        return None
    figure, axes = new_figure(theme, 4.0, [len(stages) + 2] * len(panels))
    handles: list[Any] = []
    labels: list[str] = []
    for ax, (scale, shown) in zip(axes, panels.items(), strict=True):
        if scale == "signed":
            ax.axhline(0, color=theme.muted, linewidth=1, zorder=1)
        for column in shown:
            numbers = [n if n is not None and math.isfinite(n) else math.nan for n in values(column, stages)]
            index = len(labels)
            color, marker = theme.methods[index % len(theme.methods)], MARKERS[index % len(MARKERS)]
            line = ax.plot(range(len(stages)), numbers, color=color, marker=marker)[0]
            if any(spreads(column, stages)):
                errors = [spread if spread and math.isfinite(spread) else 0.0 for spread in spreads(column, stages)]
                ax.errorbar(range(len(stages)), numbers, errors, fmt="none", ecolor=color, elinewidth=1, capsize=2)
            handles.append(line)
            labels.append(heading(column))
        ax.margins(x=0.08, y=0.12)
        ax.set_xticks(range(len(stages)), [plain(stage.get("name", i + 1), 14) for i, stage in enumerate(stages)])
        if len(stages) > 6:
            ax.tick_params(axis="x", labelrotation=45)
    add_legend(figure, handles, labels, theme)
    aim = "↓ should be low, ↑ high" if _should_rise(columns) else "↓ should fall, ↑ should stay"
    set_title(axes[0], f"After each of {len(stages)} stages: {aim}", theme)
    caption = "Metrics after each stage; a steady decline of ↑ is damage that adds up. Gaps are stages without a value."
    if over_runs(stages):
        caption += f" With bars of error: {over_runs(stages)}."
    shown_columns = [column for columns in panels.values() for column in columns]
    return Drawing("stages", "Stage by stage", caption, figure, say_rows(shown_columns, stages))


def by_scale(columns: Items, rows: Items) -> dict[str, list[Mapping[str, Any]]]:
    """Groups the columns with a finite value by what can share an axis."""
    panels: dict[str, list[Mapping[str, Any]]] = {"score": [], "signed": [], "unit": []}
    for column in columns:
        numbers = values(column, rows)
        if any(number is not None and math.isfinite(number) for number in numbers):
            signed = goal_of(column) == "zero" or min(n for n in numbers if n is not None and math.isfinite(n)) < 0
            panels["signed" if signed else "unit" if decimals(numbers) > 1 else "score"].append(column)
    return {scale: group for scale, group in panels.items() if group}
