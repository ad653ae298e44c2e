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
    bounds = {"least": least, "most": most, "spread": list(spread) if spread else None}
    return {"what": what, "value": value, "unit": unit} | {key: v for key, v in bounds.items() if v is not None}


def met(found: dict[str, Any]) -> bool | None:
    """Whether a row is within its aim. `None`: it has none."""
    if "least" not in found and "most" not in found:
        return None
    return bool(found.get("least", float("-inf")) <= found["value"] <= found.get("most", float("inf")))


def write_rows(path: Path | None, rows: list[dict[str, Any]], **more: object) -> None:
    """Writes what there is so far. A benchmark calls it after each row, so that a run that is cut off leaves some."""
    if path is not None:
        path.write_text(json.dumps({"rows": rows, **more}, default=str) + "\n", encoding="utf-8")
