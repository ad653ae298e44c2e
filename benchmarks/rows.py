"""What a benchmark found: numbers with their unit and their aim, as JSON for the table of `benchmarks/gpu/run.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def row(
    what: str,
    value: float,
    unit: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    spread: Sequence[float] | None = None,
) -> dict[str, Any]:
    """One number. `least` and `most` bound its aim, `spread` is its lower and upper quartile."""
    found: dict[str, Any] = {"what": what, "value": value, "unit": unit}
    bounds = {"least": least, "most": most}
    found |= {name: bound for name, bound in bounds.items() if bound is not None}
    if spread is not None:
        found["spread"] = list(spread)
    if len(bounds.keys() & found):  # NaN is within no aim
        found["met"] = (least is None or value >= least) and (most is None or value <= most)
    return found


def write_rows(path: Path | None, rows: list[dict[str, Any]], **more: object) -> None:
    """Writes what there is so far. A benchmark calls it after each row, so that a run that is cut off leaves some."""
    if path is not None:
        path.write_text(json.dumps({"rows": rows, **more}, default=str) + "\n", encoding="utf-8")
