"""Figures of training: losses, gradients and the rule's weights, from the `log_history` of trainer_state.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from blur_trainer.report.figures.spoken import say_series
from blur_trainer.report.figures.style import Drawing, Theme, add_legend, is_number, new_figure, set_title

Entries = Sequence[Mapping[str, Any]]


def series(history: Entries, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged quantity. Values that are not finite become NaN, a gap in the line."""
    pairs = ((entry.get("step"), entry.get(key)) for entry in history)
    points = [(step, value) for step, value in pairs if is_number(step) and is_number(value)]
    steps, logged = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(logged), logged, np.nan)


def draw_losses(history: Entries, theme: Theme) -> Drawing | None:
    """Draws forget and retain loss, each on its own scale, or the single loss if the log has no parts."""
    panels = [("loss/forget", "Forget loss", theme.forget), ("loss/retain", "Retain loss", theme.retain)]
    panels = [panel for panel in panels if len(series(history, panel[0])[0])]
    panels = panels or [panel for panel in [("loss", "Loss", theme.ink)] if len(series(history, "loss")[0])]
    if not panels:
        return None
    figure, axes = new_figure(theme, 3.125, [1] * len(panels))
    for ax, (key, label, color) in zip(axes, panels, strict=True):
        steps, logged = series(history, key)
        _line(ax, steps, logged, color, "o")
        finite = logged[np.isfinite(logged)]
        ends = list(dict.fromkeys(f"{value:.3g}" for value in finite[[0, -1]])) if len(finite) else ["never finite"]
        set_title(ax, f"{label}: {' → '.join(ends)}", theme)
    caption = "One scale per panel. Dotted vertical lines are steps where the loss was not finite."
    numbers = " ".join(say_series(label, *series(history, key)) for key, label, _ in panels)
    return Drawing("losses", "Losses over steps", caption, figure, numbers)


def draw_gradients(history: Entries, theme: Theme) -> Drawing | None:
    """Draws the norms of the two gradients (logarithmic), their cosine, and the rule's weights."""
    panels: list[tuple[Callable[[Axes, list[np.ndarray]], str], list[str]]] = [
        (_norm_axis, ["grad/forget_norm", "grad/retain_norm"]),
        (_cosine_axis, ["grad/cosine"]),
        (_weight_axis, ["grad/weight_forget", "grad/weight_retain"]),
    ]
    panels = [(finish, [key for key in keys if len(series(history, key)[0])]) for finish, keys in panels]
    panels = [(finish, keys) for finish, keys in panels if keys]
    if not panels:
        return None
    figure, axes = new_figure(theme, 3.5, [1] * len(panels))
    lines: dict[str, Any] = {}
    for ax, (finish, keys) in zip(axes, panels, strict=True):
        if finish is not _norm_axis:
            ax.axhline(0, color=theme.muted, linewidth=1, zorder=1)
        for key in keys:
            role = "forget" if "forget" in key else "retain" if "retain" in key else ""
            color = {"forget": theme.forget, "retain": theme.retain, "": theme.ink}[role]
            line = _line(ax, *series(history, key), color, "D" if role == "retain" else "o")
            lines |= {role: line} if role else {}
        set_title(ax, finish(ax, [series(history, key)[1] for key in keys]), theme)
    if lines:
        add_legend(figure, list(lines.values()), list(lines), theme)
    caption = (
        "How long the two gradients are; whether they agree (below zero, what helps forgetting hurts retaining); "
        "and the weights that the rule gave them."
    )
    shown = [key for _, keys in panels for key in keys]
    numbers = " ".join(say_series(key.removeprefix("grad/").replace("_", " "), *series(history, key)) for key in shown)
    return Drawing("gradients", "Gradients and the rule", caption, figure, numbers)


def _line(ax: Axes, steps: np.ndarray, logged: np.ndarray, color: str, marker: str) -> Any:
    """Draws the logged values. Many values are drawn faintly, with their running mean on top."""
    many = len(steps) >= 40
    ax.plot(
        steps,
        logged,
        color=color,
        marker=marker if len(steps) <= 20 else "",
        markersize=5,
        linewidth=0.8 if many else 1.8,
        alpha=0.4 if many else 1.0,
    )
    if many:
        half = len(steps) // 30 + 1
        windows = [logged[max(0, i - half) : i + half + 1] for i in range(len(logged))]
        means = [np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows]
        ax.plot(steps, np.where(np.isfinite(logged), means, np.nan), linewidth=2.0, color=color)
    for step in steps[~np.isfinite(logged)]:
        ax.axvline(step, color=color, linewidth=0.8, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("step")
    return ax.plot([], [], color=color, linewidth=2.0, marker=marker, markersize=5)[0]


def _norm_axis(ax: Axes, logged: list[np.ndarray]) -> str:
    if any((norms > 0).any() for norms in logged):
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return "Gradient norms (log scale)"


def _cosine_axis(ax: Axes, logged: list[np.ndarray]) -> str:
    finite = logged[0][np.isfinite(logged[0])]
    if not len(finite):
        return "Cosine: never finite"
    limit = min(1.05, max(0.1, 1.2 * float(np.abs(finite).max())))
    ax.set_ylim(-limit, limit)
    return f"Cosine: below 0 at {100 * (finite < 0).mean():.0f} % of steps"


def _weight_axis(ax: Axes, logged: list[np.ndarray]) -> str:
    return "Weights of the rule"
