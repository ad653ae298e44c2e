"""The two readings of a sweep over strengths, and its fronts, as tables for the report."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from blur_trainer.report.equal_footing import Bound, Chosen, Run, areas, best_within, scores
from blur_trainer.report.paired import verdict
from blur_trainer.report.pareto import share_of_way
from blur_trainer.report.tables import column_of, decimals, goal_of, heading, role_of

Columns = Sequence[Mapping[str, Any]]
AREA = {"name": "area", "label": "Area below the front", "goal": "max"}


def check_shares(tolerance: float = 0.05, utility: float = 0.95) -> None:
    """Raises `ValueError` unless the tolerance is in [0, 1) and the utility in (0, 1]."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: pass a share of the way, at least 0 and below 1, e.g. 0.05.")
    if not 0 < utility <= 1:
        raise ValueError(f"utility={utility}: pass a share of the target's, above 0 and at most 1, e.g. 0.95.")


@dataclass(frozen=True)
class Yardstick:
    """
    What counts as forgotten and as kept, and between which two models.

    Args:
        columns: the columns of `metrics.json`.
        target, retrained: metrics of the model before unlearning, and of the one that never saw the forget set.
        forgotten: the metrics that must reach the level. Default: those of the forget set that should fall. One that
            target and retrained model have alike is left out.
        kept: the metrics whose mean share of the target's is what a model kept. Default: those to keep that rise.
        shown: the metrics in the table at equal forgetting. Default: `kept`.
        tolerance: the level is reached at the share `1 - tolerance` of the way from target to retrained model, in each
            of `forgotten`.
        utility: the share of the target's that is wished at equal utility.
    """

    columns: Columns
    target: Mapping[str, float]
    retrained: Mapping[str, float]
    forgotten: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    tolerance: float = 0.05
    utility: float = 0.95

    def __post_init__(self) -> None:
        check_shares(self.tolerance, self.utility)
        asked = self.forgotten or self._of_role("forget", "min")
        moving = tuple(name for name in asked if self._between(name))
        kept = tuple(name for name in self.kept or self._of_role("retain", "max") if self.target.get(name))
        if not moving or not kept:
            raise ValueError(
                f"Nothing to compare: of {list(asked)} target and retrained model must differ in one, and of what is "
                f"kept {list(kept)} the target must have one above 0."
            )
        object.__setattr__(self, "forgotten", moving)
        object.__setattr__(self, "kept", kept)

    def _of_role(self, role: str, goal: str) -> tuple[str, ...]:
        return tuple(c["name"] for c in self.columns if role_of(c) == role and goal_of(c) == goal)

    def _between(self, name: str) -> bool:
        ends = self.target.get(name), self.retrained.get(name)
        return None not in ends and ends[0] != ends[1]

    def measure(self, run: Run) -> dict[str, Any]:
        """
        The run with two more numbers, both a share: `way` of what is least forgotten (1 at the retrained model and
        beyond), `kept` of the target's on average. `None` where a metric is missing.
        """
        ways = [self._share(run.get(name), self.target[name], self.retrained[name], True) for name in self.forgotten]
        kept = [self._share(run.get(name), 0.0, self.target[name], False) for name in self.kept]
        return {
            **run,
            "way": None if None in ways else min(way for way in ways if way is not None),
            "kept": None if None in kept else mean(share for share in kept if share is not None),
        }

    @staticmethod
    def _share(value: float | None, start: float, aim: float, clip: bool) -> float | None:
        return None if value is None or not math.isfinite(value) else share_of_way(value, start, aim, clip=clip)

    def labels(self, names: Sequence[str]) -> str:
        """The headings of these metrics in one sentence."""
        return ", ".join(heading({**column_of(name, self.columns), "goal": None}) for name in names)


def read_sweep(runs: Sequence[Run], yardstick: Yardstick) -> dict[str, Any]:
    """
    The two readings, the fronts and the points of a sweep, for `metrics.json` under `"footing"`.

    Args:
        runs: `{"method", "setting", "strength", "seed", ...}` and metrics. `method` and `setting` are shown.
        yardstick: what is measured, and how.

    Returns:
        `dict` with `readings`, a list of tables `{"title", "note", "columns", "rows", "verdicts"}`; `points`, one
        `{"method", "strength", "seed", "way", "kept"}` per run; and `level` and `utility`, the two lines of the figure.
    """
    measured = [yardstick.measure(run) for run in runs]
    keys = ("method", "strength", "seed", "way", "kept")
    return {
        "readings": [_forgetting(measured, yardstick), _utility(measured, yardstick), _fronts(measured, yardstick)],
        "points": [{key: run[key] for key in keys} for run in measured],
        "level": 1 - yardstick.tolerance,
        "utility": yardstick.utility,
    }


def _forgetting(runs: Sequence[Run], yardstick: Yardstick) -> dict[str, Any]:
    chosen = best_within(runs, [Bound("way", low=1 - yardstick.tolerance)], "kept")
    kept = [column_of(name, yardstick.columns) for name in yardstick.shown or yardstick.kept]
    columns = [*kept, *(column_of(name, yardstick.columns) for name in yardstick.forgotten)]
    return {
        "title": "At equal forgetting: what is left",
        "note": f"Of each method and seed the strength that keeps most ({yardstick.labels(yardstick.kept)}) among "
        f"those that forget enough: at least {1 - yardstick.tolerance:.0%} of the way from the target to the retrained "
        f"model in {yardstick.labels(yardstick.forgotten)}. Forgetting more than that earns nothing.",
        "columns": columns,
        "rows": _rows(runs, chosen, columns, yardstick, "forgets enough"),
        "verdicts": [_said(column, scores(chosen, column["name"]), goal_of(column) or "max") for column in kept],
    }


def _utility(runs: Sequence[Run], yardstick: Yardstick) -> dict[str, Any]:
    ordered = sorted(runs, key=lambda run: -(run["kept"] or 0))  # of those that forget alike, who keeps most
    found = best_within(ordered, [Bound("kept", low=yardstick.utility)], "way")
    chosen = {method: found[method] for method in dict.fromkeys(run["method"] for run in runs)}
    columns = [column_of(name, yardstick.columns) for name in yardstick.forgotten]
    return {
        "title": "At equal utility: what is still known",
        "note": "Of each method and seed the strength that forgets most among those that keep enough: at least "
        f"{yardstick.utility:.0%} of the target's {yardstick.labels(yardstick.kept)}. In the comparison a value beyond "
        "the retrained model's counts as that value.",
        "columns": columns,
        "rows": _rows(runs, chosen, columns, yardstick, "keeps enough"),
        "verdicts": [_still_known(column, chosen, yardstick) for column in columns],
    }


def _still_known(column: Mapping[str, Any], chosen: Chosen, yardstick: Yardstick) -> dict[str, Any]:
    name = column["name"]
    aim, falls = yardstick.retrained[name], yardstick.retrained[name] < yardstick.target[name]
    no_better = max if falls else min
    known = {
        method: {seed: None if value is None else no_better(value, aim) for seed, value in values.items()}
        for method, values in scores(chosen, name).items()
    }
    return _said(column, known, "min" if falls else "max")


def _fronts(runs: Sequence[Run], yardstick: Yardstick) -> dict[str, Any]:
    found = areas(runs, "way", "kept")
    return {
        "title": "Over all strengths",
        "note": "The area below the front of each method, seed by seed (reference point 0, 0): 0 where nothing is "
        "forgotten or nothing kept, 1 where all is forgotten that the retrained model does not know, and as much kept "
        "as the target has. Compare methods with equally many strengths.",
        "columns": [AREA],
        "rows": [_row(method, [AREA], [{"area": area} for area in own.values()]) for method, own in found.items()],
        "verdicts": [_said(AREA, found, "max")],
    }


def _rows(
    runs: Sequence[Run], chosen: Chosen, columns: Columns, yardstick: Yardstick, what: str
) -> list[dict[str, Any]]:
    """The target, each method over the seeds that have a run, with its strengths in words, the retrained model."""
    rows = [{"name": "target", "kind": "target", "metrics": dict(yardstick.target)}]
    for method, seeds in chosen.items():
        own = [run for run in seeds.values() if run is not None]
        tried = [run for run in runs if run["method"] == method]
        listed = [f"{run['strength']:g}" for run in own] or dict.fromkeys(f"{run['strength']:g}" for run in tried)
        with_what = f"with {tried[0].get('setting', 'strength')} {', '.join(listed)}"
        share = f"{what} in {len(own)} of {len(seeds)} seed{'s' * (len(seeds) > 1)}" if own else f"never {what}"
        rows.append({**_row(method, columns, own), "said": f"{share}, {with_what}"})
    return [*rows, {"name": "retrain", "kind": "retrain", "metrics": dict(yardstick.retrained)}]


def _row(method: str, columns: Columns, runs: Sequence[Run]) -> dict[str, Any]:
    """Mean and standard deviation of each column; nothing where a run lacks it."""
    metrics: dict[str, float | None] = {}
    spread: dict[str, float] = {}
    for name in (column["name"] for column in columns):
        values = [run.get(name) for run in runs]
        known = [value for value in values if value is not None and math.isfinite(value)]
        metrics[name] = mean(known) if known and len(known) == len(values) else None
        if metrics[name] is not None and len(known) > 1:
            spread[name] = stdev(known)
    row = {"name": method, "kind": "unlearned", "metrics": metrics}
    return {**row, "spread": spread, "runs": len(runs)} if spread else row


def _said(
    column: Mapping[str, Any], values: Mapping[str, Mapping[Hashable, float | None]], goal: str
) -> dict[str, Any]:
    """The verdict of a column: who is best, or that no difference is shown."""
    found = verdict(values, goal if goal in ("max", "min") else "max")
    digits = decimals([value for own in values.values() for value in own.values()])
    return {
        "column": heading({**column, "goal": None}),
        "winner": found.winner,
        "text": found.sentence(digits),
        "left_out": list(found.left_out),
    }
