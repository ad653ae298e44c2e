"""The runs of a comparison: methods x strengths x seeds, their folders and flags, and what is made of their numbers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blur_trainer.report.readings import Yardstick, read_sweep
from blur_trainer.report.seeds import mean_and_spread
from blur_trainer.scripts.strengths import strength_of

Content = Mapping[str, Any]  # of a metrics.json


class Run(NamedTuple):
    """One run of a comparison. Without strengths a method has its own one, and no setting is named."""

    method: str
    seed: int
    setting: str = ""
    strength: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The name of its folder."""
        between = "" if self.strength is None else f"{self.setting}={self.strength:g}-"
        return f"{self.method}-{between}{self.seed}"


def check_factors(factors: Sequence[float]) -> None:
    """Raises `ValueError` unless all are above 0, finite and different."""
    if not all(math.isfinite(factor) and factor > 0 for factor in factors) or len(set(factors)) < len(factors):
        raise ValueError(f"--strengths {list(factors)}: pass different numbers above 0, multiples of a method's own.")


def plan(arguments: Mapping[str, Any], seeds: Sequence[int], factors: Sequence[float] | None) -> list[Run]:
    """
    All runs, seed by seed, so that what an interrupt leaves is whole for some seeds.

    Args:
        arguments: of each method what its run is configured with.
        seeds: of each method and strength one run per seed.
        factors: multiples of each method's own strength (`blur_trainer.scripts.strengths`); `None`: this one, unnamed.
    """
    runs = []
    for seed, (method, args) in itertools.product(seeds, arguments.items()):
        if factors is None:
            runs.append(Run(method, seed))
            continue
        strength = strength_of(method)
        for value in (strength.scaled(args, factor) for factor in factors):
            runs.append(Run(method, seed, strength.setting, value, tuple(strength.flags(args, value))))
    return runs


def joined(runs: Sequence[Run], contents: Mapping[Run, Content]) -> dict[str, Any]:
    """One content of those of all finished runs: the target, each method in each strength, the retrained model."""
    groups: dict[tuple[str, float | None], list[Content]] = {(run.method, run.strength): [] for run in runs}
    for run, content in contents.items():
        groups[run.method, run.strength].append(_named(content, run))
    means = [mean_and_spread(group) for group in groups.values() if group]
    rows = {row["name"]: row for mean in means for row in mean["rows"]}
    for mean in means[1:]:
        for sample, other in zip(means[0]["samples"], mean["samples"], strict=True):
            sample["responses"] |= other["responses"]
    order = sorted(rows.values(), key=lambda row: ["target", "unlearned", "retrain"].index(row["kind"]))
    settings = {k: v for k, v in means[0]["settings"].items() if all(mean["settings"].get(k) == v for mean in means)}
    return means[0] | {"rows": order, "settings": settings}


def _named(content: Content, run: Run) -> dict[str, Any]:
    """The content, whose row names the strength too."""
    if run.strength is None:
        return dict(content)
    [label] = [row["name"] for row in content["rows"] if row["kind"] == "unlearned"]
    name = f"{label}, {run.setting} {run.strength:g}"
    rows = [row | {"name": name, "method": label} if row["name"] == label else row for row in content["rows"]]
    samples = [
        sample | {"responses": {name if key == label else key: text for key, text in sample["responses"].items()}}
        for sample in content["samples"]
    ]
    return {**content, "rows": rows, "samples": samples}


def footing(contents: Mapping[Run, Content], like: Content, **yardstick: Any) -> dict[str, Any]:
    """
    The readings at equal forgetting and at equal utility of the runs that have a strength: see [`read_sweep`].

    Args:
        contents: of each run.
        like: the joined content, with the rows of target and retrained model.
        yardstick: metrics and shares of [`Yardstick`]. Of the named metrics those that are no column are not read.

    Raises:
        ValueError: if there is no retrained model, or no metric of the forget set that should fall, or none to keep.
    """
    kinds = {row["kind"]: row["metrics"] for row in like["rows"]}
    if "retrain" not in kinds:
        raise ValueError("Equal forgetting is the retrained model's, and there is none: pass one (--retain_model).")
    columns = {column["name"] for column in like["columns"]}
    chosen: dict[str, Any] = {
        k: tuple(n for n in v if n in columns) if isinstance(v, tuple) else v for k, v in yardstick.items()
    }
    runs = []
    for run, content in contents.items():
        [row] = [row for row in content["rows"] if row["kind"] == "unlearned"]
        runs.append({**row["metrics"], **run._asdict(), "method": row["name"]})
    return read_sweep(runs, Yardstick(like["columns"], kinds["target"], kinds["retrain"], **chosen))
