"""Extraction Strength: how little of a text must be given before a model writes the rest."""

import datasets
import evaluate
import numpy as np

from blur_trainer.metrics.exact_memorization import token_matches
from blur_trainer.metrics.protocols import OPEN_UNLEARNING, OPEN_UNLEARNING_CITATION, TOFU

_DESCRIPTION = """\
Extraction Strength: 1 - k / T, with k the least number of a text's T tokens after which all the others are the model's
most likely ones, averaged over texts. Between 0 (nothing can be extracted) and 1 (the prompt suffices); on forget data
lower is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`):
        Per text the token that is most likely at each position of the answer, given the true tokens before it.
    references (`list[list[int]]`):
        Per text the true tokens at these positions, end of sequence included.
    protocol (`str`, *optional*, defaults to `"tofu"`):
        `"tofu"` counts every token, and a text whose last token is not predicted has 0 (the benchmark itself does not
        have this metric). `"open-unlearning"` leaves the last token, the end of sequence, out and never goes below
        1 / T.

Returns:
    `dict`: `{"extraction_strength": float}`.

Example:

    >>> from blur_trainer.metrics.extraction_strength import ExtractionStrength
    >>> extraction_strength = ExtractionStrength(keep_in_memory=True)
    >>> extraction_strength.compute(predictions=[[5, 6, 7, 2]], references=[[5, 9, 7, 2]])
    {'extraction_strength': 0.5}

"""


def extraction_strength(matches: np.ndarray, protocol: str = TOFU) -> float:
    """Length of the longest predicted suffix, as a share of the text. Input: which tokens are predicted."""
    misses = np.flatnonzero(~matches)
    suffix = len(matches) - 1 - int(misses[-1]) if misses.size else len(matches)
    if protocol == OPEN_UNLEARNING:
        suffix = max(1, suffix)
    return suffix / len(matches)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExtractionStrength(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=OPEN_UNLEARNING_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("int64")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2506.12618", "https://github.com/locuslab/open-unlearning"],
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], protocol: str = TOFU
    ) -> dict[str, float]:
        rows = token_matches(predictions, references, protocol)
        return {"extraction_strength": float(np.mean([extraction_strength(row, protocol) for row in rows]))}
