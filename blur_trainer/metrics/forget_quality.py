"""Forget Quality: can a statistical test tell an unlearned model from one that never saw the forget set?"""

import math

import datasets
import evaluate
import numpy as np
from scipy.stats import ks_2samp

from blur_trainer.metrics.protocols import TOFU_CITATION

_DESCRIPTION = """\
Forget Quality (TOFU): p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios that an unlearned
model and a model trained without the forget set give to the forget questions. Between 0 and 1, higher is better: above
0.05 the two are hard to tell apart. Also its base-10 logarithm, as in the paper's figures.
"""

_KWARGS_DESCRIPTION = """
The test sees only the order of the numbers: truth ratios or their reciprocals (the form in TOFU's logs) give the same
value. It does depend on their count: TOFU compares the first 300 forget questions (answers cut to 200 tokens),
open-unlearning all of them (512 tokens). Pass the rows that you mean.

Args:
    predictions (`list[float]`):
        Truth ratios of the unlearned model (`truth_ratios`), one per forget question.
    references (`list[float]`):
        Those of the model trained on the retain set only, on the same questions.

Returns:
    `dict`: `{"forget_quality": float, "log10_forget_quality": float, "ks_statistic": float}`. The logarithm of a
    p-value that underflows to 0 is `-inf`.

Example:

    >>> from blur_trainer.metrics.forget_quality import ForgetQuality
    >>> forget_quality = ForgetQuality(keep_in_memory=True)
    >>> forget_quality.compute(predictions=[0.3, 0.1, 0.2], references=[0.2, 0.3, 0.1])
    {'forget_quality': 1.0, 'log10_forget_quality': 0.0, 'ks_statistic': 0.0}

"""


def check_ratios(name: str, ratios: np.ndarray) -> None:
    """Raises if there are no truth ratios, or one is NaN or negative. Infinity is allowed: only the order counts."""
    if ratios.size == 0:
        raise ValueError(f"`{name}` is empty: a test needs at least one truth ratio per model.")
    bad = np.flatnonzero(~(ratios >= 0))
    if bad.size:
        raise ValueError(f"`{name}` must hold truth ratios, 0 or more, got {ratios[bad[0]]} at index {bad[0]}.")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ForgetQuality(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=TOFU_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        model, retain = np.asarray(list(predictions)), np.asarray(list(references))
        check_ratios("predictions", model)
        check_ratios("references", retain)
        test = ks_2samp(model, retain)
        p = float(test.pvalue)
        return {
            "forget_quality": p,
            "log10_forget_quality": math.log10(p) if p > 0 else -math.inf,
            "ks_statistic": float(test.statistic),
        }
