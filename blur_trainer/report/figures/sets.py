"""Figure of a run on one's own data: what each model still says of each set, and the forget loss beside the level."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from matplotlib.axes import Axes

from blur_trainer.report.figures.style import Drawing, Theme, add_legend, new_lines, plain, row_colors, set_title
from blur_trainer.report.own_run import SETS, aim, own_columns
from blur_trainer.report.tables import values

Items = Sequence[Mapping[str, Any]]
WIDTH = 5.4  # inches: a telephone shows it at two thirds, and its text is still read
LARGE = 10.5
BAR = 0.2  # inches


def draw_sets(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws one bar per model and set: ROUGE of the answers; below it the forget loss. A line is the aim."""
    columns, rows = own_columns(metrics), metrics.get("rows") or []
    named = {column["name"]: column for column in columns}
    said = [named[f"{name}_rouge"] for name in SETS if f"{name}_rouge" in named]
    losses = [named["forget_loss"]] if "forget_loss" in named else []
    panels = [panel for panel in (said, losses) if any(map(_finite, _numbers(panel, rows)))]
    if not panels:
        return None
    heights = [0.9 + BAR * (len(rows) + 1) * len(panel) for panel in panels]
    figure, axes = new_lines(theme, sum(heights) / len(panels), [[1]] * len(panels), WIDTH, heights)
    looks = row_colors(rows, theme)
    for ax, panel in zip(axes, panels, strict=True):
        _bars(ax, panel, rows, looks, theme)
        loss = panel is losses
        title = "Loss of the forget set, nats per token" if loss else "Share of the true answers that it says"
        set_title(ax, title, theme)
    handles = [axes[0].barh([0], [0], color=color, height=0)[0] for color in looks]
    labels = [row["name"] for row in rows]
    if any(aim(column, rows)[0] is not None for panel in panels for column in panel):
        handles.append(axes[0].plot([], [], color=theme.ink, linewidth=2)[0])
        labels.append("best")
    add_legend(figure, handles, labels, theme)
    caption = (
        "Forgetting is done where a bar ends at its line: what is to be forgotten as in a model that never saw it, "
        "what is to be kept as before. Above: ROUGE of greedy answers."
    )
    return Drawing("sets", "What it still says", caption, figure, _said([*said, *losses], rows))


def _bars(ax: Axes, columns: Items, rows: Items, looks: Sequence[str], theme: Theme) -> None:
    size = 0.8 / len(rows)
    for group, column in enumerate(columns):
        for i, number in enumerate(values(column, rows)):
            place = group + (i - (len(rows) - 1) / 2) * size
            length = number if _finite(number) else 0.0
            ax.barh(place, length, size * 0.86, color=looks[i])
            text = "—" if number is None else f"{number:.2f}"
            ax.annotate(
                text, (length, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5, color=theme.ink
            )
        best, _ = aim(column, rows)
        if _finite(best):
            ax.plot([best, best], [group - 0.46, group + 0.46], color=theme.ink, linewidth=2, zorder=3)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.tick_params(labelsize=LARGE - 1)
    labels = ["forget" if column["name"] == "forget_loss" else _set(column) for column in columns]
    ax.set_yticks(range(len(columns)), labels, fontsize=LARGE)
    ax.set_ylim(len(columns) - 0.5, -0.5)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)


def _set(column: Mapping[str, Any]) -> str:
    return plain(column["name"].removesuffix("_rouge"), 14)


def _numbers(columns: Items, rows: Items) -> list[float | None]:
    return [number for column in columns for number in values(column, rows)]


def _finite(number: float | None) -> TypeGuard[float]:
    return number is not None and math.isfinite(number)


def _said(columns: Items, rows: Items) -> str:
    """All numbers, for the alternative text."""
    sentences = []
    for column in columns:
        best, whose = aim(column, rows)
        shown = [(row["name"], n) for row, n in zip(rows, values(column, rows), strict=True) if n is not None]
        texts = [f"{name} {number:.2f}" for name, number in shown]
        texts += [] if best is None else [f"best {best:.2f} ({whose})"]
        sentences.append(f"{column.get('label') or column['name']}: {', '.join(texts)}.")
    return " ".join(sentences)
