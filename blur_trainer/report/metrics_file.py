"""Reads `trainer_state.json` and `metrics.json`, and checks what a template and a figure take for granted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any] | None:
    """The object in a file; `None` if there is no file. Raises `ValueError` for anything else."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({error}). Was it cut off? Write it again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} must hold a JSON object, but it holds a {type(data).__name__}.")
    return data


def check_files(state: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the two have the shape that `write_report` describes."""
    _check(state, {"log_history": None})
    _check(metrics, {"columns": "name", "rows": "name", "stages": None, "samples": "prompt", "tables": "title"})
    for table in metrics.get("tables") or []:
        heads, rows = table.get("heads"), table.get("rows")
        if not isinstance(heads, list) or not isinstance(rows, list) or any(len(row) != len(heads) for row in rows):
            raise ValueError(f'"tables" must have "heads", and "rows" as long as these, but got {str(table)[:80]}.')
    robustness = _object(metrics, "robustness")
    _check(robustness, {"attacks": "name", "relearning": "points"})
    for curve in robustness.get("relearning") or []:
        _check(curve, {"points": "steps"})
    _check_inside(_object(metrics, "inside"))
    footing = _object(metrics, "footing")
    _check(footing, {"readings": "rows", "points": "method"})
    for reading in footing.get("readings") or []:
        _check(reading, {"columns": "name", "rows": "name", "verdicts": "text"})
    verdict = _object(metrics, "verdict")
    if metrics.get("verdict") is not None and any(not isinstance(verdict.get(k), str) for k in ("word", "sentence")):
        raise ValueError(f'"verdict" must have the texts "word" and "sentence", but got {str(verdict)[:80]}.')
    _check(verdict, {"findings": "text"})


def _check_inside(inside: Mapping[str, Any]) -> None:
    parts = {"probes": ["layers", "models"], "depth": ["layers", "unlearned", "retrained", "score"]}
    for name, keys in parts.items():
        found = _object(inside, name)
        if found and not found.keys() >= set(keys):
            raise ValueError(f'"{name}" must be a JSON object with {keys}, but got {str(found)[:80]}.')
    for key in ("name", "forget_loss"):
        _check(_object(inside, "probes"), {"models": key})
    for key in ("name", "layers", "accuracy"):
        _check(inside, {"choices": key})


def _object(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    data = metrics.get(key)
    if data is not None and not isinstance(data, dict):
        raise ValueError(f'"{key}" must be a JSON object, but got {str(data)[:80]}.')
    return data or {}


def _check(data: Mapping[str, Any], lists: Mapping[str, str | None]) -> None:
    """Raises unless every one of `lists` is absent, or a list of objects with the named key."""
    for key, needed in lists.items():
        items = data.get(key) or []
        good = isinstance(items, list) and all(isinstance(item, dict) for item in items)
        if not good or (needed and any(needed not in item for item in items)):
            having = f', each with a "{needed}"' if needed else ""
            raise ValueError(f'"{key}" must be a list of JSON objects{having}, but got {str(items)[:80]}.')
