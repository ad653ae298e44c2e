"""Figure of a sweep over strengths: what each method forgets against what it keeps, and the front of each."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from blur_trainer.report.equal_footing import Bound, best_within
from blur_trainer.report.figures.style import MARKERS, Drawing, Theme, add_legend, new_figure, plain, set_title
from blur_trainer.report.pareto import pareto_front

Points = Sequence[Mapping[str, Any]]
LINES = ("-", "--", ":", "-.")
LOWEST = 0.4  # below the utility of comparison: a broken model would squeeze all others


def draw_front(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws the plane of forgotten and kept with the front of each method; beside it what is kept at the level."""
    footing = metrics.get("footing") or {}
    points = [p for p in footing.get("points") or [] if p.get("way") is not None and p.get("kept") is not None]
    if not points:
        return None
    methods = list(dict.fromkeys(point["method"] for point in footing["points"]))
    looks = {method: _look(i, theme) for i, method in enumerate(methods)}
    figure, (ax, side) = new_figure(theme, 5.6, (1.9, 1))
    for method, look in looks.items():
        _draw_method(ax, [p for p in points if p["method"] == method], look)
    lowest = min(point["kept"] for point in points)
    low = max(lowest, footing["utility"] - LOWEST)
    _frame(ax, low, max(1.0, *(point["kept"] for point in points)), footing, theme)
    set_title(ax, "Better is further right and up", theme)
    _draw_level(side, points, (footing["level"], low), looks, theme)
    add_legend(figure, [Line2D([], [], markersize=7, **look) for look in looks.values()], methods, theme)
    seeds = len({point["seed"] for point in points})
    caption = (
        "Left. Large: a strength, mean "
        + (f"and standard deviation over {seeds} seeds; small: its runs. " if seeds > 1 else "of one seed. ")
        + "Steps: the front of a method, on which none of its strengths is beaten in both. 100 % to the right is the "
        "retrained model. Dashed: what counts as enough. "
        + ("Runs that keep less than the lowest value of the axis are not shown. " if low > lowest else "")
        + "Right: of each method the best of the strengths that forget enough, mean and standard deviation over seeds."
    )
    return Drawing("front", "Forgotten against kept, by strength", caption, figure, _said(points))


def _said(points: Points) -> str:
    """Forgotten and kept of each method and strength, on average."""
    texts = []
    for method, strength in dict.fromkeys((point["method"], point["strength"]) for point in points):
        own = [point for point in points if (point["method"], point["strength"]) == (method, strength)]
        way, kept = (mean(point[key] for point in own) for key in ("way", "kept"))
        texts.append(f"{method} at {strength:g}: {way:.0%} forgotten, {kept:.0%} kept.")
    return " ".join(texts)


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
            bars: dict[str, Any] = {"ecolor": look["color"], "elinewidth": 1, "capsize": 2}
            ax.errorbar(x, y, spread_y, spread_x, fmt="none", zorder=3, **bars)
    ax.plot(*zip(*centers, strict=True), **center_look, markersize=7.5, zorder=4)
    front = [centers[i] for i in pareto_front(centers)]
    steps: dict[str, Any] = {
        "color": look["color"],
        "linestyle": look["linestyle"],
        "drawstyle": "steps-pre",
        "alpha": 0.7,
    }
    ax.plot(*zip(*front, strict=True), linewidth=1.3, zorder=3, **steps)


def _frame(ax: Axes, low: float, high: float, footing: Mapping[str, Any], theme: Theme) -> None:
    """Limits, so that the spread of what is kept fills the height, and the two lines of comparison."""
    room = 0.06 * max(high - low, 0.05)
    ax.set_xlim(-0.03, 1.04)
    ax.set_ylim(low - room, high + room)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("Forgotten: share of the way from the target to the retrained model")
    ax.set_ylabel("Kept: share of the target's")
    level, utility = footing["level"], footing["utility"]
    line: dict[str, Any] = {"color": theme.muted, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    ax.axvline(level, **line)
    ax.axhline(utility, **line)
    words: dict[str, Any] = {
        "fontsize": 8,
        "color": theme.muted,
        "textcoords": "offset points",
        "annotation_clip": True,
    }
    ax.annotate("enough forgotten", (level, high + room), (0, 3), ha="center", va="bottom", **words)
    ax.annotate("enough kept", (ax.get_xlim()[0], utility), (4, -4), ha="left", va="top", **words)


def _draw_level(
    ax: Axes, points: Points, least: tuple[float, float], looks: Mapping[str, Mapping[str, Any]], theme: Theme
) -> None:
    """One line per method: what it keeps at equal forgetting, by seed and on average, or words where there is none."""
    level, low = least
    chosen = best_within(points, [Bound("way", low=level)], "kept")
    words: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": theme.muted}
    for place, (method, look) in enumerate(looks.items()):
        kept = [run["kept"] for run in chosen.get(method, {}).values() if run is not None]
        point_look = {**look, "linestyle": ""}
        if not kept or mean(kept) < low:
            text = f"keeps {mean(kept):.0%}" if kept else "never forgets enough"
            ax.annotate(text, (0.02, place), bbox={"facecolor": theme.paper, "lw": 0, "pad": 1}, **words)
            continue
        ax.plot(mean(kept), place, **point_look, markersize=7.5, zorder=4)
        if len(kept) > 1:
            ax.plot(kept, [place] * len(kept), **point_look, markersize=3.5, alpha=0.45, zorder=2)
            bars: dict[str, Any] = {"ecolor": look["color"], "elinewidth": 1, "capsize": 2}
            ax.errorbar(mean(kept), place, xerr=stdev(kept), fmt="none", zorder=3, **bars)
    ax.set_yticks(range(len(looks)), [plain(method, 20) for method in looks])
    ax.set_ylim(len(looks) - 0.5, -0.5)
    ax.set_xlim(left=low - 0.02)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("Kept: share of the target's")
    set_title(ax, "At equal forgetting", theme)
