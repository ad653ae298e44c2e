"""How tables show a [`ForgetEvaluation`]."""

from collections.abc import Sequence

from blur_trainer.evaluation.base import Column

#: the metrics of each set: label, and which values are good where the model is to keep its knowledge
METRICS = {
    "rouge": ("ROUGE", "max"),
    "loss": ("Loss", "min"),
    "probability": ("Probability", "max"),
    "exact": ("Exact", "max"),
    "extraction": ("Extraction", "max"),
}


def columns_of(sets: Sequence[str], level: float | None, tasks: Sequence[Column]) -> list[Column]:
    """The columns of these sets, with a level, and those of lm-evaluation-harness."""
    columns = [_column(name, metric, level) for name in sets for metric in METRICS]
    if "unseen" in sets:
        columns.append(
            {"name": "membership_auc", "label": "Membership AUC", "goal": "near", "near": 0.5, "role": "forget"}
        )
    if {"retain", "hold"} & set(sets):
        columns.append({"name": "degeneration", "label": "Degeneration", "goal": "min", "role": "retain"})
    columns.append({"name": "forget_degeneration", "label": "Degeneration forget", "goal": "min", "role": "forget"})
    if level is not None:
        columns.append({"name": "score", "label": "Missing and paid", "goal": "min"})
    return [*columns, *({**task, "name": f"lm_eval_{task['name']}"} for task in tasks)]  # type: ignore[list-item]


def _column(name: str, metric: str, level: float | None) -> Column:
    """
    The column of one metric of one set.

    Differs from benchmarks that show the least known forget set as the best: the best is the nearest to the level, or
    to the retrained model's value where the column has none.
    """
    label, goal = METRICS[metric]
    column: Column = {"name": f"{name}_{metric}", "label": f"{label} {name}"}
    if name in ("retain", "hold"):
        return {**column, "goal": goal, "role": "retain"}
    if name == "unseen":
        return column
    near: Column = {"near": level} if name == "forget" and metric == "loss" and level is not None else {}
    return {**column, "goal": "near", "role": "forget", **near}
