"""Joins several runs of one comparison: the mean of each row and its standard deviation."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev  # exact: the same numbers have exactly themselves as mean, and no spread
from typing import Any

from blur_trainer.atomic_write import atomic_write

Row = Mapping[str, Any]


def mean_and_spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    r"""
    Joins several `metrics.json` that differ in the seed. `write_report` and `format_table` then show mean ± spread.

    For a metric with the values $x_1, \dots, x_n$ in the $n$ runs

    $$
    \bar x = \frac1n \sum_i x_i, \qquad s = \sqrt{\frac{1}{n-1} \sum_i (x_i - \bar x)^2}
    $$

    A row with the same metrics in all runs (a target that no seed touches) stays one row without a spread. A metric
    with a value that is not finite in some run has a mean (which is not finite) and no spread.

    The mean of p-values is that of the numbers, not of their logarithms: the mean of `forget_quality_log10` is not the
    logarithm of the mean `forget_quality`.

    Args:
        runs (`Sequence[Mapping]`):
            What [`Results.save`] returned or wrote in each run: the same benchmark, columns and rows (by name) in all.
            One run is given back as it is.

    Returns:
        `dict` with the benchmark, columns, plane and samples of the first run; `rows`, and `stages` where there are,
        with the means, `"spread": {metric: s}` and `"runs": n`; and `settings`, where one that differs between the runs
        is the list of its values. Without `robustness` and `inside`, which are of one run's model.

    Raises:
        ValueError: if there is no run, or a run has another benchmark, other columns, other rows, a row twice, or lacks
            a metric that another run has.

    Example:

    ```python
    from blur_trainer.report.seeds import mean_and_spread, write_means

    contents = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    write_means(out, mean_and_spread(contents))
    write_report(out)
    ```
    """
    if not runs:
        raise ValueError("`mean_and_spread` needs the metrics of at least one run, but got none.")
    first = runs[0]
    for key in ("benchmark", "columns", "plane"):
        for number, run in enumerate(runs, 1):
            if run.get(key) != first.get(key):
                raise ValueError(
                    f"Run {number} has another {key} than run 1: {run.get(key)!r} instead of {first.get(key)!r}. "
                    "Average runs of one comparison only."
                )
    if len(runs) == 1:
        return dict(first)
    content = {**first, "rows": _merge_all(runs, "rows"), "settings": _merge_settings(runs)}
    content.pop("robustness", None)
    content.pop("inside", None)
    if any(run.get("stages") for run in runs):
        content["stages"] = _merge_all(runs, "stages")
    return content


def write_means(output_dir: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a `metrics.json` for [`write_report`]. After a kill the file is complete or absent."""
    folder, text = Path(output_dir), json.dumps(content, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "metrics.json", lambda partial: partial.write_text(text, encoding="utf-8"))


def _merge_all(runs: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows (or stages) of all runs, one per name, in the order of the first run."""
    tables = [_by_name(run.get(key) or [], number) for number, run in enumerate(runs, 1)]
    for name in dict.fromkeys(name for table in tables for name in table):
        lacking = [str(number) for number, table in enumerate(tables, 1) if name not in table]
        if lacking:
            raise ValueError(
                f"Run {', '.join(lacking)} of {len(runs)} has no row {name!r} in its {key}, others have: finish that "
                "run, or leave the row out of all."
            )
    return [_merge(name, [table[name] for table in tables]) for name in tables[0]]


def _by_name(rows: Sequence[Row], number: int) -> dict[str, Row]:
    table: dict[str, Row] = {}
    for row in rows:
        if row["name"] in table:
            raise ValueError(f"Run {number} has the row {row['name']!r} twice: give each row a name of its own.")
        table[row["name"]] = row
    return table


def _merge(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One row: means, and their spread where the runs differ."""
    kinds = list(dict.fromkeys(row.get("kind") for row in rows))
    if len(kinds) > 1:
        raise ValueError(f"The row {name!r} is of kind {kinds[0]!r} in one run and of kind {kinds[1]!r} in another.")
    metrics: dict[str, float | None] = {}
    spread: dict[str, float] = {}
    for metric in dict.fromkeys(metric for row in rows for metric in row.get("metrics") or {}):
        numbers = _everywhere(name, metric, [(row.get("metrics") or {}).get(metric) for row in rows])
        metrics[metric] = mean(numbers) if numbers else None
        if numbers and all(math.isfinite(number) for number in numbers):
            spread[metric] = stdev(numbers)
    merged = {**rows[0], "metrics": metrics}
    if "seconds" in rows[0]:
        seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
        merged["seconds"] = mean(seconds) if seconds else None
    if any(spread.values()):
        merged |= {"spread": spread, "runs": len(rows)}
    return merged


def _everywhere(name: str, metric: str, numbers: Sequence[float | None]) -> list[float]:
    """The numbers of all runs, or none at all."""
    measured = [number for number in numbers if number is not None]
    if measured and len(measured) < len(numbers):
        lacking = ", ".join(str(run) for run, number in enumerate(numbers, 1) if number is None)
        raise ValueError(
            f"Run {lacking} of {len(numbers)} has no {metric!r} of the row {name!r}, others have: means over "
            "different runs would not compare. Evaluate it, or leave it out of all."
        )
    return measured


def _merge_settings(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all; of one that differs, the values in the order of the runs."""
    tables = [run.get("settings") or {} for run in runs]
    merged = {}
    for key in dict.fromkeys(key for table in tables for key in table):
        given = [table.get(key) for table in tables]
        merged[key] = given[0] if all(value == given[0] for value in given) else given
    return merged
