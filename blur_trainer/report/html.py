"""Writes the report: trainer_state.json and metrics.json become PNG figures and one self-contained HTML file."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.figures import DARK, LIGHT, NAMES, Drawing, draw_all, over_runs, row_colors
from blur_trainer.report.summary import find_faults, read_results, read_sweep, read_training
from blur_trainer.report.tables import (
    arrow_of,
    best_value,
    cells,
    format_number,
    goal_of,
    heading,
    robustness_columns,
    robustness_rows,
    spread_texts,
    values,
)

Items = Sequence[Mapping[str, Any]]
DPI = 192  # two pixels per CSS pixel


def write_report(output_dir: str | os.PathLike[str]) -> Path:
    """
    Writes `report.html` and `figures/*.png` from what a run left in `output_dir`. No model, no network.

    Args:
        output_dir: folder with `trainer_state.json` (the `TrainerState` of transformers) and `metrics.json` (columns,
            rows, settings and, if present, plane, stages, robustness and samples). One of the two may be absent.

    Returns:
        The path of `report.html`. If writing fails, the previous file stays.

    Raises:
        FileNotFoundError: if neither file is there.
        ValueError: if a file is not the JSON that is described above.
    """
    folder = Path(output_dir)
    state, metrics = _load(folder / "trainer_state.json"), _load(folder / "metrics.json")
    if state is None and metrics is None:
        raise FileNotFoundError(
            f"Nothing to report in {str(folder)!r}: it holds neither trainer_state.json (written by "
            "`trainer.save_state()`) nor metrics.json (written after evaluation). Pass the `output_dir` of a run."
        )
    _check(state or {}, {"log_history": None})
    _check(metrics or {}, {"columns": "name", "rows": "name", "stages": None, "samples": "prompt"})
    _check_robustness((metrics or {}).get("robustness"))
    _check_footing((metrics or {}).get("footing"))
    page = Environment(loader=PackageLoader("blur_trainer.report"), autoescape=True, undefined=StrictUndefined)
    html = page.get_template("report.html").render(
        **_content(state or {}, metrics or {}),
        drawings=_figures(folder / "figures", (state or {}).get("log_history") or [], metrics or {}),
        absent=_absent(state, metrics),
    )
    path = folder / "report.html"
    atomic_write(path, lambda file: file.write_bytes(html.encode("utf-8", errors="replace")))
    return path


def _absent(state: Any, metrics: Any) -> list[str]:
    """Names of the missing files. A mean over several runs needs no training log."""
    several = over_runs((metrics or {}).get("rows") or [])
    files = {"trainer_state.json": state is None and not several, "metrics.json": metrics is None}
    return [name for name, missing in files.items() if missing]


def _load(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({error}). Was it cut off? Write it again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} must hold a JSON object, but it holds a {type(data).__name__}.")
    return data


def _check(data: Mapping[str, Any], lists: Mapping[str, str | None]) -> None:
    """Raises unless every one of `lists` is absent, or a list of objects with the named key."""
    for key, needed in lists.items():
        items = data.get(key) or []
        good = isinstance(items, list) and all(isinstance(item, dict) for item in items)
        if not good or (needed and any(needed not in item for item in items)):
            having = f', each with a "{needed}"' if needed else ""
            raise ValueError(f'"{key}" must be a list of JSON objects{having}, but got {str(items)[:80]}.')


def _check_robustness(data: Any) -> None:
    if data is None:
        return
    if not isinstance(data, dict):
        raise ValueError(f'"robustness" must be a JSON object, but got {str(data)[:80]}.')
    _check(data, {"attacks": "name", "relearning": "points"})
    for curve in data.get("relearning") or []:
        _check(curve, {"points": "steps"})


def _check_footing(data: Any) -> None:
    if data is None:
        return
    if not isinstance(data, dict):
        raise ValueError(f'"footing" must be a JSON object, but got {str(data)[:80]}.')
    _check(data, {"readings": "rows", "points": "method"})
    for reading in data.get("readings") or []:
        _check(reading, {"columns": "name", "rows": "name", "verdicts": "text"})


def _robustness(columns: Items, rows: Items, data: Mapping[str, Any]) -> dict[str, Any]:
    """The table of attacks as a template needs it."""
    rows = robustness_rows(data, rows)
    shown = robustness_columns(columns, rows)
    return {"columns": _heads(shown), "rows": _table(shown, rows)}


def _readings(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of a sweep as a template needs them. What the verdicts say stands below; no cell is highlighted."""
    readings = (metrics.get("footing") or {}).get("readings") or []
    return [
        {**reading, "columns": _heads(reading["columns"]), "rows": _table(reading["columns"], reading["rows"])}
        for reading in readings
    ]


def _dots(rows: Items) -> list[tuple[str, tuple[str, str]]]:
    """The name of each row, and its color on light and on dark paper."""
    colors = zip(row_colors(rows, LIGHT), row_colors(rows, DARK), strict=True)
    return [(row["name"], pair) for row, pair in zip(rows, colors, strict=True)]


def _heads(columns: Items) -> list[tuple[str, str]]:
    """Label and arrow of each column."""
    return [(heading({**column, "goal": None}), arrow_of(column)) for column in columns]


def _content(state: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    columns, rows = metrics.get("columns") or [], metrics.get("rows") or []
    settings = dict(metrics.get("settings") or {})
    versions = {k: settings.pop(k) for k in ("environment", "versions") if isinstance(settings.get(k), dict)}
    readings = _readings(metrics)
    tables = [*(reading["rows"] for reading in readings), rows]
    return {
        "benchmark": metrics.get("benchmark") or "Training run",
        "results": read_sweep(metrics) or read_results(columns, rows, list((metrics.get("plane") or {}).values())),
        "training": read_training(state),
        "faults": find_faults(state, columns, rows),
        "columns": _heads(columns),
        "rows": _table(columns, rows),
        "readings": readings,
        "robust": _robustness(columns, rows, metrics.get("robustness") or {}),
        "timed": any(row.get("seconds") is not None for row in rows),
        "compared": len(_methods(rows)) > 1,
        "over_runs": over_runs(rows),
        "dots": dict(pair for table in tables for pair in _dots(table)),
        "settings": {key: _text(value) for key, value in settings.items()},
        "versions": {key: _text(value) for group in versions.values() for key, value in group.items()},
        "samples": metrics.get("samples") or [],
        "themes": {"light": LIGHT, "dark": DARK},
    }


def _table(columns: Items, rows: Items) -> list[dict[str, Any]]:
    texts = [
        list(zip(cells(column, rows), spread_texts(column, rows), _best(column, rows), strict=True))
        for column in columns
    ]
    return [
        {
            "name": row["name"],
            "kind": row.get("said") or row.get("kind") or "",
            "cells": [column[i] for column in texts],
            "seconds": format_number(row.get("seconds")),
        }
        for i, row in enumerate(rows)
    ]


def _methods(rows: Items) -> list[int]:
    """The rows of methods: all but the target and the retrained model."""
    return [i for i, row in enumerate(rows) if row.get("kind") not in ("target", "retrain")]


def _best(column: Mapping[str, Any], rows: Items) -> list[bool]:
    """Which rows to highlight: the best of at least two methods, and all that are printed the same."""
    goal, texts, numbers = goal_of(column), cells(column, rows), values(column, rows)
    aim = best_value(column, rows)
    scores = {"min": lambda x: x, "max": lambda x: -x, "zero": abs, "near": lambda x: abs(x - aim)}
    methods = [i for i in _methods(rows) if numbers[i] is not None and numbers[i] == numbers[i]]
    if goal is None or len(methods) < 2 or (goal == "near" and (aim is None or aim != aim)):
        return [False] * len(rows)
    best = min(methods, key=lambda i: scores[goal](numbers[i]))
    return [i in methods and texts[i] == texts[best] for i in range(len(rows))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figures(folder: Path, history: Items, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draws light and dark figures. Saves the light ones as files and removes figures of an earlier run."""
    light, dark = (draw_all(history, metrics, theme) for theme in (LIGHT, DARK))
    folder.mkdir(exist_ok=True)
    for name in set(NAMES) - {drawing.name for drawing in light}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    shown = []
    for drawing, night in zip(light, dark, strict=True):
        png = _png(drawing)
        atomic_write(folder / f"{drawing.name}.png", partial(Path.write_bytes, data=png))
        width, height = (round(96 * inches) for inches in drawing.figure.get_size_inches())
        sources = {"light": _data_uri(png), "dark": _data_uri(_png(night)), "width": width, "height": height}
        shown.append({"title": drawing.title, "caption": drawing.caption, **sources})
    return shown


def _png(drawing: Drawing) -> bytes:
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
