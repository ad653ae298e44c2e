"""The numbers of a figure in words, for its alternative text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blur_trainer.report.tables import cells, heading, values

Items = Sequence[Mapping[str, Any]]
MOST = 8  # metrics: who listens to more is served better by the table


def say_rows(columns: Items, rows: Items) -> str:
    """ "ROUGE forget: before 1.000, after 0.643." for each column."""
    texts = []
    for column in columns[:MOST]:
        named = zip(rows, cells(column, rows), values(column, rows), strict=True)
        shown = [
            f"{row.get('name', i + 1)} {text}" for i, (row, text, number) in enumerate(named) if number is not None
        ]
        if shown:
            texts.append(f"{heading({**column, 'goal': None})}: {', '.join(shown)}.")
    if len(columns) > MOST:
        texts.append(f"{len(columns) - MOST} more metrics are in the figure.")
    return " ".join(texts)


def say_series(label: str, steps: np.ndarray, logged: np.ndarray) -> str:
    """ "Forget loss: 151 at step 1, 30 at step 50." """
    known = np.isfinite(logged)
    if not known.any():
        return f"{label}: never finite."
    points = dict(zip(steps[known][[0, -1]], logged[known][[0, -1]], strict=True))  # of one entry one point
    return f"{label}: {', '.join(f'{value:.3g} at step {step:.0f}' for step, value in points.items())}."
