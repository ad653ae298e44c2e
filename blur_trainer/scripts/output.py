"""What a run leaves: `metrics.json`, model cards, the report; and its tables for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blur_trainer.report.html import write_report
from blur_trainer.report.results import Results
from blur_trainer.report.tables import format_table, robustness_rows
from blur_trainer.trainers.unlearning import UnlearningTrainer


def settings_of(script: Any, args: Any, names: Sequence[str]) -> dict[str, Any]:
    """What the report says of a run: these settings of its trainer, and all arguments of its script."""
    return {**{name: getattr(args, name) for name in names}, **vars(script)}


def write_output(
    out: Path,
    results: Results,
    trainers: Mapping[str, UnlearningTrainer],
    settings: dict[str, Any],
    *,
    columns: Sequence[str] | None = None,
    attack_width: int = 100,
) -> str:
    """
    Write all files of a run: to be called by one process.

    Args:
        out: the folder of the run.
        results: all rows; with attacks a second table shows them, in the evaluation's primary metrics.
        trainers: by the names of their rows. Each gets a model card with the numbers.
        settings: what the report says of the run.
        columns: the names that the first table shows; `None` for all.
        attack_width: the width of the second table, in characters.

    Returns:
        The tables, and where the report is.
    """
    metrics = results.save(out, settings)
    for row, trainer in trainers.items():
        trainer.create_model_card(metrics=metrics, row=row)

    def table(names: Sequence[str] | None, rows: Sequence[Any], width: int) -> str:
        shown = [column for column in results.columns if names is None or column["name"] in names]
        return f"\n{format_table(shown, rows, width)}\n"

    text = table(columns, results.rows, 100)
    if results.robustness:
        attacks = robustness_rows(results.robustness, results.rows)
        text += table(results.evaluation.primary_metrics, attacks, attack_width)
    return f"{text}\nReport: {write_report(out)}"
