"""Figure of a sweep over strengths: what each method forgets against what it keeps, and the front of each."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from blur_trainer.report.figures.style import MARKERS, Drawing, Theme, add_legend, new_figure, set_title
from blur_trainer.report.pareto import pareto_front

Points = Sequence[Mapping[str, Any]]
LINES = ("-", "--", ":", "-.")


def draw_front(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws each run small, each strength's mean over the seeds large, and the front of the means as steps."""
    footing = metrics.get("footing") or {}
    points = [p for p in footing.get("points") or [] if p.get("way") is not None and p.get("kept") is not None]
    if not points:
        return None
    figure, (ax,) = new_figure(theme, 5.6, width=8.5)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    methods = list(dict.fromkeys(point["method"] for point in footing["points"]))
    handles = []
    for i, method in enumerate(methods):
        look = _look(i, theme)
        _draw_method(ax, [p for p in points if p["method"] == method], look)
        handles.append(Line2D([], [], markersize=7, **look))
    _frame(ax, points, footing, theme)
    add_legend(figure, handles, methods, theme)
    set_title(ax, "Better is further right and up", theme)
    seeds = len({point["seed"] for point in points})
    caption = (
        "Large: a strength, mean "
        + (f"and standard deviation over {seeds} seeds; small: its runs. " if seeds > 1 else "of one seed. ")
        + "Steps: the front of a method, on which none of its strengths is beaten in both. 100 % to the right is the "
        "retrained model. Dashed: the level, and the utility at which the methods are compared."
    )
    return Drawing("front", "Forgotten against kept, by strength", caption, figure)


def _look(i: int, theme: Theme) -> dict[str, Any]:
    """Color, marker and line of the i-th method. Where the colors begin anew, markers are hollow and lines dashed."""
    color, again = theme.methods[i % len(theme.methods)], i // len(theme.methods)
    look = {"color": color, "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[again % len(LINES)]}
    return {**look, "markerfacecolor": theme.paper if again % 2 else color}


def _draw_method(ax: Axes, points: Points, look: Mapping[str, Any]) -> None:
    center_look, centers = {**look, "linestyle": ""}, []
    for strength in dict.fromkeys(point["strength"] for point in points):
        own = [(point["way"], point["kept"]) for point in points if point["strength"] == strength]
        x, y = (mean(values) for values in zip(*own, strict=True))
        centers.append((x, y))
        if len(own) > 1:
            ax.plot(*zip(*own, strict=True), **center_look, markersize=3.5, alpha=0.45, zorder=2)
            spread_x, spread_y = (stdev(values) for values in zip(*own, strict=True))
            bars = {"ecolor": look["color"], "elinewidth": 1, "capsize": 2}
            ax.errorbar(x, y, spread_y, spread_x, fmt="none", zorder=3, **bars)
    ax.plot(*zip(*centers, strict=True), **center_look, markersize=7.5, zorder=4, clip_on=False)
    front = [centers[i] for i in pareto_front(centers)]
    steps = {"color": look["color"], "linestyle": look["linestyle"], "drawstyle": "steps-pre", "alpha": 0.7}
    ax.plot(*zip(*front, strict=True), linewidth=1.3, zorder=3, **steps)


def _frame(ax: Axes, points: Points, footing: Mapping[str, Any], theme: Theme) -> None:
    """Limits, so that the spread of what is kept fills the height, and the two lines of comparison."""
    lowest = min(point["kept"] for point in points)
    highest = max(1.0, *(point["kept"] for point in points))
    room = 0.06 * max(highest - lowest, 0.05)
    ax.set_xlim(-0.03, 1.04)
    ax.set_ylim(max(lowest - room, -0.03), highest + room)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("Forgotten: share of the way from the target to the retrained model")
    ax.set_ylabel("Kept: share of the target's")
    level, utility = footing["level"], footing["utility"]
    line = {"color": theme.muted, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    ax.axvline(level, **line)
    ax.axhline(utility, **line)
    words = {"fontsize": 8, "color": theme.muted, "textcoords": "offset points", "annotation_clip": True}
    ax.annotate("enough forgotten", (level, ax.get_ylim()[1]), (0, 3), ha="center", va="bottom", **words)
    ax.annotate("enough kept", (ax.get_xlim()[0], utility), (4, -4), ha="left", va="top", **words)
