"""Reads runs of methods x strengths x seeds on an equal footing: at equal forgetting, at equal utility, as fronts.

A run is a flat mapping: `{"method": "NPO", "strength": 0.3, "seed": 0, "forget_rouge": 0.51, "retain": 0.97, ...}`.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blur_trainer.report.paired import Interval, mean_interval
from blur_trainer.report.pareto import front_area

Run = Mapping[str, Any]
Chosen = dict[str, dict[Hashable, Run | None]]  # {method: {seed: its run, or None}}


@dataclass(frozen=True)
class Bound:
    """
    What a run must reach: `low <= run[metric] <= high`. A run without the metric, or with NaN, does not.

    Example:

    ```python
    loss, rouge = retrained["forget_loss"], retrained["forget_rouge"]
    level = [Bound("forget_loss", low=0.9 * loss), Bound("forget_rouge", high=rouge + 0.1)]
    ```
    """

    metric: str
    low: float = -math.inf
    high: float = math.inf

    def holds(self, run: Run) -> bool:
        """Whether the run is within the bound."""
        value = run.get(self.metric)
        return value is not None and self.low <= value <= self.high


def way_bound(metric: str, start: float, aim: float, tolerance: float) -> Bound:
    """
    At least the share `1 - tolerance` of the way from `start` (the target's value) to `aim` (the retrained model's).

    Values beyond the aim are within the bound.

    Raises:
        ValueError: if the tolerance is not in [0, 1), or `start` and `aim` are the same or not finite.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: pass a share of the way, at least 0 and below 1, e.g. 0.1.")
    if start == aim or not (math.isfinite(start) and math.isfinite(aim)):
        raise ValueError(f"{metric!r} is {start} at the start and {aim} at the aim: no way between them. Leave it out.")
    end = start + (1 - tolerance) * (aim - start)
    return Bound(metric, low=end) if aim > start else Bound(metric, high=end)


def best_within(runs: Sequence[Run], bounds: Sequence[Bound], metric: str, goal: str = "max") -> Chosen:
    """
    Of each method and seed the run with the best `metric` among those within all bounds; `None` where there is none.

    At equal forgetting: bounds on what is forgotten, the best of what is kept. At equal utility: bounds on what is
    kept, the best (`goal="min"`) of what is still known. The strength is chosen for each seed by the numbers that are
    then reported, for all methods by the same rule: give each method the same number of strengths.

    Args:
        runs (`Sequence[Mapping]`): with `method`, `seed` and metrics. Of equally good ones the first is returned.
        bounds (`Sequence[Bound]`): all must hold. A method whose training ends at a level by itself is read as others.
        metric (`str`): what the best run has the best of. A run without it, or with NaN, is not chosen.
        goal (`str`, defaults to `"max"`): `"max"` or `"min"`.

    Returns:
        `dict`: `{method: {seed: run or None}}`, in the order of the runs.

    Raises:
        ValueError: if `goal` is another word.
    """
    if goal not in ("max", "min"):
        raise ValueError(f"The goal must be 'max' or 'min', but got {goal!r}.")
    sign = 1 if goal == "max" else -1
    chosen: Chosen = {}
    for run in runs:
        seeds = chosen.setdefault(run["method"], {})
        best = seeds.setdefault(run["seed"], None)
        value = run.get(metric)
        if value is None or math.isnan(value) or not all(bound.holds(run) for bound in bounds):
            continue
        if best is None or sign * value > sign * best[metric]:
            seeds[run["seed"]] = run
    return chosen


def scores(chosen: Chosen, metric: str) -> dict[str, dict[Hashable, float | None]]:
    """`{method: {seed: value}}` of one metric, `None` where no run was chosen: what [`verdict`] compares."""
    return {
        method: {seed: None if run is None else run.get(metric) for seed, run in seeds.items()}
        for method, seeds in chosen.items()
    }


def areas(
    runs: Sequence[Run], forgotten: str, kept: str, reference: Sequence[float] = (0.0, 0.0)
) -> dict[str, dict[Hashable, float]]:
    """
    `{method: {seed: area below the front of the method's strengths}}`: see [`front_area`].

    Args:
        runs (`Sequence[Mapping]`): with `method`, `seed` and both metrics; a run without one of them is left out.
        forgotten, kept (`str`): names of metrics of which more is better, e.g. shares ([`share_of_way`]).
        reference: the point that all are to beat.
    """
    points: dict[str, dict[Hashable, list[tuple[float, float]]]] = {}
    for run in runs:
        own = points.setdefault(run["method"], {}).setdefault(run["seed"], [])
        if run.get(forgotten) is not None and run.get(kept) is not None:
            own.append((run[forgotten], run[kept]))
    return {
        method: {seed: front_area(own, reference) for seed, own in seeds.items()} for method, seeds in points.items()
    }


def over_seeds(values: Mapping[Hashable, float | None], confidence: float = 0.95) -> Interval | None:
    """Mean and interval over the seeds that have a value; `None` if none has."""
    known = [value for value in values.values() if value is not None and not math.isnan(value)]
    return mean_interval(known, confidence) if known else None
