"""Model Utility: one number for all that an unlearned model should still be able to do."""

import datasets
import evaluate

from blur_trainer.metrics.protocols import TOFU_CITATION, finite_array

_DESCRIPTION = """\
Model Utility (TOFU): harmonic mean of nine numbers, {Probability, ROUGE-L recall, Truth Ratio} on {Retain, Real
Authors, World Facts}, with Probability normalized over choices on the last two and Truth Ratio aggregated as for
retain data. Between 0 and 1, higher is better; 0 as soon as one of them is 0.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`):
        The nine numbers, each between 0 and 1, in any order.

Returns:
    `dict`: `{"model_utility": float}`.

Example:

    >>> from blur_trainer.metrics.model_utility import ModelUtility
    >>> model_utility = ModelUtility(keep_in_memory=True)
    >>> model_utility.compute(predictions=[1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25])
    {'model_utility': 0.42857142857142855}

"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ModelUtility(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=TOFU_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        values = finite_array("predictions", predictions)
        if len(values) != 9:
            raise ValueError(
                f"`predictions` must hold nine numbers, got {len(values)}: Probability, ROUGE-L recall and Truth Ratio "
                "on Retain, Real Authors and World Facts."
            )
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"`predictions` must lie between 0 and 1, got {values.tolist()}.")
        return {"model_utility": float(9 / (1 / values).sum()) if values.all() else 0.0}
