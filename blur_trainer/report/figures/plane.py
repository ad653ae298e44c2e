"""The plane of two metrics, usually forgetting and retaining: the position of each row and the path of training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from matplotlib.transforms import Bbox

from blur_trainer.report.figures.spoken import say_rows
from blur_trainer.report.figures.style import (
    MARKERS,
    Drawing,
    Theme,
    add_legend,
    is_number,
    new_figure,
    over_runs,
    plain,
    row_colors,
    set_title,
)
from blur_trainer.report.tables import column_of, goal_of, heading, role_of, spreads, values

Items = Sequence[Mapping[str, Any]]
# possible label positions, in points from the labelled point, best first
OFFSETS = [(9, 0), (-9, 0), (0, 9), (0, -9), (8, 8), (-8, 8), (8, -8), (-8, -8), (0, 22), (0, -22), (20, 16), (-20, 16)]


def trajectory(history: Items, names: Sequence[str], x: str, y: str) -> np.ndarray:
    """(N, 2): metrics `x` and `y` of each evaluation in the log, with any name between `eval_` and the metric."""

    def find(entry: Mapping[str, Any], name: str) -> float:
        for key, logged in entry.items():
            # `eval_muse_forget_knowmem` also ends in `_knowmem`, so take the longest known name
            owner = max((n for n in {*names, name} if key.endswith(f"_{n}")), key=len, default=None)
            if key.startswith("eval_") and owner == name and is_number(logged):
                return float(logged)
        return math.nan

    points = np.array([(find(entry, x), find(entry, y)) for entry in history], dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def draw_plane(history: Items, metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws one labelled point per row, arrows from the target to the unlearned rows, the ideal, and evaluations."""
    plane, rows = metrics.get("plane"), list(metrics.get("rows") or [])
    if not plane:
        return None
    columns = metrics.get("columns") or []
    pair = [column_of(plane[axis], columns) for axis in ("x", "y")]
    points = np.array([values(column, rows) for column in pair], dtype=float).T.reshape(-1, 2)
    shown = ~np.isnan(points).any(axis=1)
    path = trajectory(history, [column["name"] for column in columns], plane["x"], plane["y"])
    if not np.isfinite(points).all(axis=1).any() and not len(path):
        return None
    colors = [color for color, keep in zip(row_colors(rows, theme), shown, strict=True) if keep]
    rows = [row for row, keep in zip(rows, shown, strict=True) if keep]
    points = points[shown]
    figure, (ax,) = new_figure(theme, 5.25, width=7.5)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.set_xlabel(plain(heading(pair[0]), 60))
    ax.set_ylabel(plain(heading(pair[1]), 60))
    bars = np.array([spreads(column, rows) for column in pair], dtype=float).T.reshape(-1, 2)
    bars[~np.isfinite(points) | ~np.isfinite(bars)] = 0
    names = [_name(row["name"], point) for row, point in zip(rows, points, strict=True)]
    beyond = _frame(ax, points, bars, path)
    kinds = [row.get("kind") for row in rows]
    ideals = [point for point, kind in zip(points, kinds, strict=True) if kind == "retrain"]
    _mark_ideal(ax, ideals, theme)
    ways = _draw_ways(ax, points, kinds, colors, path, theme)
    for i, point in enumerate(points):
        ax.plot(*point, MARKERS[i % len(MARKERS)], color=colors[i], markersize=8, zorder=4, clip_on=False)
    ways = np.concatenate([ways, *_draw_bars(ax, points, bars, colors)])
    title, better = _titles(pair, bool(ideals))
    set_title(ax, better, theme)
    _label(ax, points, names, colors, ways)
    caption = _caption(kinds, rows, beyond, int((~shown).sum()))
    return Drawing("plane", title, caption, figure, say_rows(pair, rows))


def _titles(pair: Items, has_ideal: bool) -> tuple[str, str]:
    """The title, and where in the plane a model should be, if the goals of the two axes tell it."""
    x, y = pair
    labels = [heading({**column, "goal": None}) for column in pair]
    against = {role_of(x), role_of(y)} == {"forget", "retain"}
    title = "Forgetting against retaining" if against else f"{labels[1]} against {labels[0]}"
    ways = {"min": ("left", "down"), "max": ("right", "up")}
    if has_ideal and {goal_of(x), goal_of(y)} != {"max"}:
        return title, "The closer to the retrained model, the better"
    wanted = [ways[goal][axis] for axis, column in enumerate(pair) if (goal := goal_of(column) or "") in ways]
    return title, f"Better is further {' and '.join(wanted)}" if wanted else title


def _caption(kinds: list[Any], rows: Items, beyond: bool, missing: int) -> str:
    """The caption. It says how many rows are not drawn."""
    sentences = []
    if "target" in kinds and "unlearned" in kinds:
        sentences.append("Arrows lead from the target to the unlearned model.")
    if "retrain" in kinds:
        sentences.append("The rings are the region of the retrained, where forgetting should arrive.")
    if over_runs(rows):
        sentences.append(f"Points with bars: {over_runs(rows)}.")
    if beyond:
        sentences.append("Points on the frame lie beyond it: a value is infinite.")
    if missing:
        rows_are = "rows" if missing > 1 else "row"
        sentences.append(f"Not shown, for want of one of the two metrics: {missing} {rows_are}.")
    return " ".join(sentences)


def _name(name: str, point: np.ndarray) -> str:
    """The row's name, with the value if it is infinite."""
    infinite = [f" ({value:.0f})" for value in point if np.isinf(value)]
    return plain(name, 26) + (infinite[0] if infinite else "")


def _frame(ax: Axes, points: np.ndarray, bars: np.ndarray, path: np.ndarray) -> bool:
    """
    Sets limits with room for labels, also for a single point. Moves infinite coordinates onto the frame, in place.

    Returns:
        Whether there were infinite coordinates.
    """
    inside = np.concatenate([points - bars, points + bars, path])
    inside[np.isinf(inside)] = np.nan
    low, high = np.nanmin(inside, axis=0), np.nanmax(inside, axis=0)
    room = 0.14 * np.maximum(high - low, np.maximum(0.05 * np.abs(high), 1e-3))
    low, high = low - room, high + room
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    beyond = bool(np.isinf(points).any())
    np.clip(points, low, high, out=points)
    return beyond


def _draw_bars(ax: Axes, points: np.ndarray, bars: np.ndarray, colors: list[str]) -> list[np.ndarray]:
    """Draws the spread of each point on both axes. Returns points along the bars, which labels should avoid."""
    ways = []
    for point, bar, color in zip(points, bars, colors, strict=True):
        if bar.any():
            x, y = point
            ax.errorbar(x, y, bar[1], bar[0], fmt="none", ecolor=color, elinewidth=1.2, capsize=3, zorder=3)
            ways += [np.linspace(point - bar * side, point + bar * side, 9) for side in ((1, 0), (0, 1))]
    return ways


def _mark_ideal(ax: Axes, ideals: Sequence[np.ndarray], theme: Theme) -> None:
    spans = (np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim()))
    for ideal in ideals:
        for scale, alpha in ((0.10, 0.22), (0.18, 0.12)):
            width, height = (scale * float(span) for span in spans)
            ax.add_patch(Ellipse((ideal[0], ideal[1]), width, height, color=theme.retrain, alpha=alpha, lw=0))


def _draw_ways(
    ax: Axes, points: np.ndarray, kinds: list[Any], colors: list[str], path: np.ndarray, theme: Theme
) -> np.ndarray:
    """Draws arrows from target to unlearned, and the path of evaluations. Returns points for labels to avoid."""
    targets = [point for point, kind in zip(points, kinds, strict=True) if kind == "target"]
    unlearned = [i for i, kind in enumerate(kinds) if kind == "unlearned"]
    ways = [path]
    for i in unlearned:
        for target in targets[:1]:
            arrow = {"arrowstyle": "-|>", "color": colors[i], "lw": 1.6, "shrinkA": 7, "shrinkB": 7}
            ax.annotate("", points[i], target, arrowprops=arrow, zorder=3)
            ways.append(np.linspace(target, points[i], 24))
    if len(path):
        # the log belongs to one run; with several unlearned rows it is unknown which
        color = colors[unlearned[0]] if len(unlearned) == 1 else theme.muted
        joined = np.concatenate([np.array(targets[:1]).reshape(-1, 2), path])
        ax.plot(*joined.T, color=color, linewidth=1, linestyle=":", zorder=2)
        dots = ax.plot(*path.T, ".", color=color, markersize=7, zorder=3)
        add_legend(ax.figure, dots, ["evaluations during training"], theme)  # type: ignore[arg-type]
    return np.concatenate(ways)


def _label(ax: Axes, points: np.ndarray, names: list[str], colors: list[str], ways: np.ndarray) -> None:
    """Puts each name where it covers least of other names, points, paths and the edge of the axes."""
    figure = ax.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    taken = ax.transData.transform(np.concatenate([points, ways]))
    placed: list[Bbox] = []
    for point, name, color in zip(points, names, colors, strict=True):
        best: tuple[float, Any, Bbox] | None = None
        for rank, (dx, dy) in enumerate(OFFSETS):
            ha = "left" if dx > 0 else "right" if dx < 0 else "center"
            va = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            text = ax.annotate(
                name, point, (dx, dy), textcoords="offset points", ha=ha, va=va, color=color, fontsize=9, zorder=5
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            outside = sum(not figure.bbox.contains(*corner) for corner in box.corners())
            cost = rank / 100 + box.count_contains(taken) + 30 * box.count_overlaps(placed) + 1000 * outside
            if best is not None and cost >= best[0]:
                text.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (cost, text, box)
        placed += [best[2]] if best else []
