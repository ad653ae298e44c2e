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
from blur_trainer.report.metrics_file import check_files, load
from blur_trainer.report.own_run import SETS, by_set, meanings, own_columns, verdict_texts
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
    role_of,
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
            rows, settings and, if present, plane, stages, robustness, inside, samples, verdict and tables). One of the
            two may be absent.

    Returns:
        The path of `report.html`. If writing fails, the previous file stays.

    Raises:
        FileNotFoundError: if neither file is there.
        ValueError: if a file is not the JSON that is described above.
    """
    folder = Path(output_dir)
    state, metrics = load(folder / "trainer_state.json"), load(folder / "metrics.json")
    if state is None and metrics is None:
        raise FileNotFoundError(
            f"Nothing to report in {str(folder)!r}: it holds neither trainer_state.json (written by "
            "`trainer.save_state()`) nor metrics.json (written after evaluation). Pass the `output_dir` of a run."
        )
    check_files(state or {}, metrics or {})
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
    """Names of the missing files. Where nothing was trained, and for a mean over several runs, there is no log."""
    without_log = (metrics or {}).get("trained") is False or over_runs((metrics or {}).get("rows") or [])
    files = {"trainer_state.json": state is None and not without_log, "metrics.json": metrics is None}
    return [name for name, missing in files.items() if missing]


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
    apart = ("environment", "versions", "data")
    groups = {key: settings.pop(key) for key in apart if isinstance(settings.get(key), dict)}
    if metrics.get("verdict"):
        settings.pop("notes", None)  # beside the verdict
    readings = _readings(metrics)
    tables = [*(reading["rows"] for reading in readings), rows]
    return {
        "benchmark": metrics.get("benchmark") or "Training run",
        "own": _own(metrics),
        "results": _results(metrics),
        "training": read_training(state),
        "faults": find_faults(state, columns, rows),
        "columns": _heads(columns),
        "rows": _table(columns, rows),
        "readings": readings,
        "robust": _robustness(columns, rows, metrics.get("robustness") or {}),
        "timed": any(row.get("seconds") is not None for row in rows),
        "nears": any(goal_of(column) == "near" for column in columns),
        "compared": len(_methods(rows)) > 1,
        "over_runs": over_runs(rows),
        "dots": dict(pair for table in tables for pair in _dots(table)),
        "settings": {key: _text(value) for key, value in settings.items()},
        "data": {key: _text(value) for key, value in groups.pop("data", {}).items()},
        "versions": {key: _text(value) for group in groups.values() for key, value in group.items()},
        "tables": metrics.get("tables") or [],
        "samples": _samples(metrics.get("samples") or []),
        "themes": {"light": LIGHT, "dark": DARK},
    }


def _results(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers say in sentences. A verdict or a table says it already, and nobody reads many of them."""
    if metrics.get("verdict") or own_columns(metrics) or metrics.get("tables"):
        return []
    columns, rows = metrics.get("columns") or [], metrics.get("rows") or []
    return read_sweep(metrics) or read_results(columns, rows, list((metrics.get("plane") or {}).values()))


def _own(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Numbers of a run on one's own data, and the verdict if there is one; `None` for others."""
    columns, rows, settings = own_columns(metrics), metrics.get("rows") or [], metrics.get("settings")
    if not columns and not metrics.get("verdict"):
        return None
    groups = by_set(columns, rows)
    for line in (line for group in groups for line in group["lines"]):
        line["cells"] = list(zip(line["texts"], _best(line["column"], rows), strict=True))
    told = dict(settings or {})
    verdict = verdict_texts(metrics["verdict"]) if metrics.get("verdict") else {"badge": "", "notes": []}
    return {
        **verdict,
        "notes": [*map(_text, told.get("notes") or []), *verdict["notes"]],
        "about": [_text(told[key]) for key in ("model_name_or_path", "method", "date") if told.get(key)],
        "groups": groups,
        "meanings": meanings(columns, rows),
    }


def _samples(samples: Items) -> list[dict[str, Any]]:
    """The texts by set, in the order of the sets; texts without a set in one group. Says which answers are exact."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        reference = sample.get("reference")
        known = None if reference is None else str(reference).split()
        answers = [
            (name, str(text), str(text).split() == known) for name, text in (sample.get("responses") or {}).items()
        ]
        entry = {"prompt": sample["prompt"], "reference": reference, "answers": answers}
        groups.setdefault(str(sample.get("set") or ""), []).append(entry)
    order = [*(name for name in SETS if name in groups), *(name for name in groups if name not in SETS)]
    titles = {name: SETS[name] if name and name in SETS else (name, "") for name in order}
    return [{"title": titles[n][0], "note": titles[n][1], "samples": groups[n]} for n in order]


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
    """
    Which rows to highlight: the best of at least two methods, and all that are printed the same. Of what is to be
    forgotten it is the nearest to the retrained model, where there is one: more than that is not asked for.
    """
    goal, texts, numbers = goal_of(column), cells(column, rows), values(column, rows)
    aim = best_value(column, rows)
    if goal == "min" and role_of(column) == "forget" and aim is not None:
        goal = "near"
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
        alt = " ".join(part for part in (f"{drawing.title}.", drawing.caption, drawing.numbers) if part)
        shown.append({"title": drawing.title, "caption": drawing.caption, "alt": alt, **sources})
    return shown


def _png(drawing: Drawing) -> bytes:
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
