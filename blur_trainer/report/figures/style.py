"""Style that all figures share: colors, axes, titles, legends.

It uses `Figure` objects only: no pyplot, no global style, no window. Each role and each row has one color in all
figures, from Paul Tol's color-blind-safe "bright" scheme (https://personal.sron.nl/~pault/), lighter on dark paper.
With more than five methods the colors become similar; the figures name each method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from blur_trainer.report.tables import shorten

WIDTH = 10.0  # inches; at 96 CSS pixels per inch this is the page's width
MARKERS = "oDsv^PX*"
HATCHES = ("", "//////", "....", "xxxx", "----")


@dataclass(frozen=True)
class Theme:
    """The colors of a light or dark page. `methods` are for rows other than target and retrained, in order."""

    paper: str
    ink: str
    muted: str
    grid: str
    forget: str
    retain: str
    target: str
    retrain: str
    methods: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#2b2f36",
    muted="#6b7280",
    grid="#e3e5e9",
    forget="#dd4e60",
    retain="#3a6ea5",
    target="#7d838c",
    retrain="#228833",
    methods=("#aa3377", "#d99a1c", "#3cabcf", "#5a4fa2", "#a1622d", "#0f766e", "#8f8f14", "#8c1d18"),
)
DARK = Theme(
    paper="#1b1e23",
    ink="#d9dce1",
    muted="#9aa1ab",
    grid="#353a42",
    forget="#f58391",
    retain="#76a9de",
    target="#9aa1ab",
    retrain="#5cbf6b",
    methods=("#e07bb4", "#e8bd55", "#71d0ee", "#a79df0", "#d79a68", "#4fc7ba", "#c9c756", "#ff9d8f"),
)


@dataclass(frozen=True)
class Drawing:
    """One figure, its file name (no suffix), what it shows, how to read it, and its numbers for who cannot see it."""

    name: str
    title: str
    caption: str
    figure: Figure
    numbers: str = ""


def row_colors(rows: Sequence[Mapping[str, Any]], theme: Theme) -> list[str]:
    """One color per row: the target's, the retrained model's, and the methods' in the order of the rows.

    Rows of one method in several strengths name it as `method` and have one color.
    """
    colors: list[str] = []
    methods: dict[Any, str] = {}
    for number, row in enumerate(rows):
        if row.get("kind") in ("target", "retrain"):
            colors.append(theme.target if row["kind"] == "target" else theme.retrain)
        else:
            method = row.get("method") or number
            methods.setdefault(method, theme.methods[len(methods) % len(theme.methods)])
            colors.append(methods[method])
    return colors


def row_hatches(rows: Sequence[Mapping[str, Any]], theme: Theme) -> list[str]:
    """What tells bars of one color apart, where there are more methods than colors."""
    hatches, methods = [], 0
    for row in rows:
        other = row.get("kind") in ("target", "retrain")
        hatches.append("" if other else HATCHES[methods // len(theme.methods) % len(HATCHES)])
        methods += not other
    return hatches


def over_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """ "mean and standard deviation over 3 seeds" if a row is such a mean, else empty."""
    runs = sorted({int(row.get("runs") or 0) for row in rows if row.get("spread")} - {0})
    counts = f" {runs[0]}" if len(runs) == 1 else f" {runs[0]} to {runs[-1]}" if runs else " several"
    return f"mean and standard deviation over{counts} seeds" if any(row.get("spread") for row in rows) else ""


def is_number(item: Any) -> bool:
    """Whether `item` is a JSON number. Logs also hold texts and lists, which no figure can show."""
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def plain(text: Any, length: int = 30) -> str:
    """Makes a name safe for matplotlib: printable, short, no mathematics, not hidden from the legend."""
    text = "".join(char if char.isprintable() else " " for char in str(text))
    text = shorten(text, length).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def new_figure(
    theme: Theme, height: float, ratios: Sequence[float] = (1,), width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with panels side by side (widths by `ratios`) and a light horizontal grid."""
    return new_lines(theme, height, [ratios], width)


def new_lines(
    theme: Theme,
    height: float,
    lines: Sequence[Sequence[float]],
    width: float = WIDTH,
    heights: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with several lines of panels, `height` tall on average, by the ratios `heights`."""
    figure = Figure(
        figsize=(width, height * len(lines)),
        facecolor=theme.paper,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(lines), 1, height_ratios=heights)
    axes: list[Axes] = []
    for i, ratios in enumerate(lines):
        line = grid[i].subgridspec(1, len(ratios), width_ratios=list(ratios))
        axes.extend(line.subplots(squeeze=False)[0])
    for ax in axes:
        ax.set_facecolor(theme.paper)
        ax.grid(axis="y", color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(theme.grid)
        ax.tick_params(colors=theme.ink, labelsize=8.5, length=0, which="both")
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_color(theme.ink)
            label.set_fontsize(9)
    return figure, axes


def set_title(ax: Axes, text: str, theme: Theme) -> None:
    ax.set_title(text, loc="left", fontsize=10, fontweight="bold", color=theme.ink, pad=10)


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], theme: Theme) -> None:
    """Puts the legend below all axes, with as many columns as fit the width."""
    names = [plain(label) for label in labels]
    fitting = int(figure.get_figwidth() * 11 / (6 + max(len(name) for name in names)))
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=max(1, min(len(names), fitting)),
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
    )
