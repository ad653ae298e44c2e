"""Exact Memorization: the share of a text's tokens that a model predicts."""

import datasets
import evaluate
import numpy as np

from blur_trainer.metrics.protocols import OPEN_UNLEARNING, OPEN_UNLEARNING_CITATION, TOFU, check_protocol

_DESCRIPTION = """\
Exact Memorization: the share of a text's tokens that are the model's most likely token given the true ones before,
averaged over texts. Between 0 and 1; on forget data lower is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`):
        Per text the token that is most likely at each position of the answer, given the true tokens before it.
    references (`list[list[int]]`):
        Per text the true tokens at these positions, end of sequence included.
    protocol (`str`, *optional*, defaults to `"tofu"`):
        `"tofu"` counts every token (the benchmark itself does not have this metric), `"open-unlearning"` leaves out
        the last one, the end of sequence.

Returns:
    `dict`: `{"exact_memorization": float}`.

Example:

    >>> from blur_trainer.metrics.exact_memorization import ExactMemorization
    >>> exact_memorization = ExactMemorization(keep_in_memory=True)
    >>> exact_memorization.compute(predictions=[[5, 6, 7, 2]], references=[[5, 9, 7, 2]])
    {'exact_memorization': 0.75}

"""


def token_matches(predictions: list[list[int]], references: list[list[int]], protocol: str) -> list[np.ndarray]:
    """For each text, which of its tokens are predicted."""
    check_protocol(protocol)
    last = -1 if protocol == OPEN_UNLEARNING else None
    rows = []
    for i, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(true):
            raise ValueError(f"Text {i} has {len(true)} tokens but {len(predicted)} predictions: pass one per token.")
        rows.append(np.asarray(predicted[:last]) == np.asarray(true[:last]))
        if rows[-1].size == 0:
            raise ValueError(f"Text {i} has no token to score under {protocol!r}, of the {len(true)} that were given.")
    if not rows:
        raise ValueError("Got no texts: a mean over zero examples is undefined. Pass at least one.")
    return rows


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMemorization(evaluate.Metric):
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
        return {"exact_memorization": float(np.mean([row.mean() for row in rows]))}
