"""Heat maps of what is inside the models: layers by models, a panel per test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from blur_trainer.report.figures.style import Drawing, Theme, new_lines, plain, set_title

ORDER = ("target", "unlearned", "retrained")
MOST_LAYERS = 16  # with more of them a number does not fit into its cell
ROW = 0.42  # inches


@dataclass(frozen=True)
class Panel:
    """One test: its title, the names of the models, the layers, and the numbers (models, layers)."""

    title: str
    models: Sequence[str]
    layers: Sequence[int]
    numbers: Sequence[Sequence[float]]


def draw_inside(metrics: Mapping[str, Any], theme: Theme) -> Drawing | None:
    """Draws what probes and patching found in each layer of target, unlearned and retrained model."""
    inside = metrics.get("inside") or {}
    panels = [panel for panel in (_probes(inside), _depth(inside), _choices(inside)) if panel is not None]
    if not panels:
        return None
    heights = [1.0 + ROW * len(panel.models) for panel in panels]
    figure, axes = new_lines(theme, sum(heights) / len(panels), [[1]] * len(panels), heights=heights)
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, theme)
    numbers = " ".join(_say(panel) for panel in panels)
    return Drawing("inside", "Inside, layer by layer", _caption(inside), figure, numbers)


def _probes(inside: Mapping[str, Any]) -> Panel | None:
    found = inside.get("probes")
    if not found:
        return None
    models = sorted(found["models"], key=lambda model: _rank(model["name"]))
    numbers = [_floats(model["forget_loss"]) for model in models]
    return Panel(
        "Probes: loss of the forget set, nats per token", [m["name"] for m in models], found["layers"], numbers
    )


def _depth(inside: Mapping[str, Any]) -> Panel | None:
    found = inside.get("depth")
    if not found:
        return None
    numbers = [[0.0] * len(found["layers"]), _floats(found["unlearned"]), _floats(found["retrained"])]
    return Panel("Patching: what the target's answer loses, nats per token", ORDER, found["layers"], numbers)


def _choices(inside: Mapping[str, Any]) -> Panel | None:
    found = sorted(inside.get("choices") or [], key=lambda model: _rank(model["name"]))
    if not found:
        return None
    numbers = [_floats(model["accuracy"]) for model in found]
    return Panel("Choices: accuracy of linear probes", [model["name"] for model in found], found[0]["layers"], numbers)


def _floats(numbers: Sequence[float | None]) -> list[float]:
    """NaN for what is missing."""
    return [math.nan if number is None else float(number) for number in numbers]


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else 1


def _draw(ax: Axes, panel: Panel, theme: Theme) -> None:
    colors = LinearSegmentedColormap.from_list("inside", [theme.grid, theme.retain])
    finite = [number for row in panel.numbers for number in row if math.isfinite(number)]
    low, high = min([0.0, *finite]), max([1e-9, *finite])
    image = ax.imshow(panel.numbers, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ax.grid(visible=False)
    ax.set_yticks(range(len(panel.models)), [plain(name, 20) for name in panel.models])
    if len(panel.layers) <= MOST_LAYERS:
        ax.set_xticks(range(len(panel.layers)), [str(layer) for layer in panel.layers])
        for row, numbers in enumerate(panel.numbers):
            for column, number in enumerate(numbers):
                ink = theme.paper if number > 0.4 * low + 0.6 * high else theme.ink
                ax.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=8.5, color=ink)
    else:
        scale = ax.figure.colorbar(image, ax=ax, pad=0.01)
        scale.outline.set_visible(False)
        scale.ax.tick_params(colors=theme.ink, labelsize=8.5, length=0)
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        ax.xaxis.set_major_formatter(lambda x, _: str(panel.layers[int(x)]) if 0 <= x < len(panel.layers) else "")
    ax.set_xlabel("layer")
    set_title(ax, panel.title, theme)


def _caption(inside: Mapping[str, Any]) -> str:
    sentences = []
    probes, depth = inside.get("probes"), inside.get("depth")
    if probes:
        sentences.append("A low loss where the retrained model's is high: the layer knows what was to be forgotten.")
        if probes.get("knowing") is not None:
            names = ", ".join(map(str, probes["knowing"])) or "none"
            sentences.append(f"Layers of the unlearned model that know: {names}.")
    if depth:
        (score,) = _floats([depth["score"]])
        shown = f"{score:.2f}" if math.isfinite(score) else "undefined (no row has a layer above the threshold)"
        sentences.append(
            f"Unlearning Depth Score {shown}: 0 if the unlearned model's states cost the target's answer nothing, 1 if "
            "they cost it as much as the retrained model's."
        )
    if inside.get("choices"):
        sentences.append("Accuracy above the retrained model's, or above chance: the layer has the right choice.")
    return " ".join(sentences)


def _say(panel: Panel) -> str:
    lines = [
        f"{name} {', '.join(f'{number:.2f}' for number in row)}"
        for name, row in zip(panel.models, panel.numbers, strict=True)
    ]
    layers = f"layers {panel.layers[0]} to {panel.layers[-1]}" if len(panel.layers) > 1 else f"layer {panel.layers[0]}"
    return f"{panel.title}, {layers}: {'; '.join(lines)}."
