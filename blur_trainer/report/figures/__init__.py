"""Figures of the report: turns logged history and metrics into matplotlib figures. Reads and writes no files."""

from collections.abc import Mapping, Sequence
from typing import Any

from blur_trainer.report.figures.front import draw_front
from blur_trainer.report.figures.inside import draw_inside
from blur_trainer.report.figures.leakage import draw_leakage, without_curve
from blur_trainer.report.figures.plane import draw_plane
from blur_trainer.report.figures.results import draw_bars, draw_stages
from blur_trainer.report.figures.robustness import draw_relearning
from blur_trainer.report.figures.sets import draw_sets
from blur_trainer.report.figures.style import DARK, LIGHT, Drawing, Theme, over_runs, row_colors
from blur_trainer.report.figures.training import draw_gradients, draw_losses

__all__ = ["DARK", "LIGHT", "NAMES", "Drawing", "Theme", "draw_all", "over_runs", "row_colors"]

NAMES = (
    *("front", "sets", "before_after", "plane", "leakage", "stages", "losses", "gradients", "relearning"),
    "inside",
)


def draw_all(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], theme: Theme) -> list[Drawing]:
    """
    Draws every figure that the data allow: first results, then training, robustness and what is inside. Of a sweep its
    fronts, and of a run on one's own data the sets instead of the many bars.
    """
    if front := draw_front(metrics, theme):
        return [front]
    drawings = [
        draw_sets(metrics, theme) or draw_bars(without_curve(metrics), theme),
        draw_plane(history, metrics, theme),
        draw_leakage(metrics, theme),
        draw_stages(metrics, theme),
        draw_losses(history, theme),
        draw_gradients(history, theme),
        draw_relearning(metrics, theme),
        draw_inside(metrics, theme),
    ]
    return [drawing for drawing in drawings if drawing is not None]
