"""Answer Probability: how likely a model finds the right answer, alone or among choices."""

import datasets
import evaluate
import numpy as np
from scipy.special import softmax

from blur_trainer.metrics.protocols import EPSILON, OPEN_UNLEARNING, TOFU, TOFU_CITATION, check_protocol, finite_array

_DESCRIPTION = """\
Answer Probability (TOFU): mean of p = exp(-NLL per token) of the right answer, or of p / (p + sum of the wrong answers'
p) when normalized over choices, as TOFU does for Real Authors and World Facts. Between 0 and 1. On forget data lower is
better, elsewhere higher.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`):
        Per question the mean negative log-likelihoods (nats per token) of its answers: the right one first, then the
        wrong ones, any number of them. Only the first is read unless `normalized`.
    normalized (`bool`, *optional*, defaults to `False`):
        Divide by the sum over the question's answers. Each question then needs a wrong answer.
    protocol (`str`, *optional*, defaults to `"tofu"`):
        `"tofu"` is the formula above, computed without underflow. `"open-unlearning"` adds 1e-10 to the denominator,
        which matters where all the answers are very unlikely.

Returns:
    `dict`: `{"probability": float}`.

Example:

    >>> from blur_trainer.metrics.answer_probability import AnswerProbability
    >>> probability = AnswerProbability(keep_in_memory=True)
    >>> probability.compute(predictions=[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0]])
    {'probability': 1.0}
    >>> probability.compute(predictions=[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0]], normalized=True)
    {'probability': 0.375}

"""


def answer_probability(nlls: np.ndarray, normalized: bool, protocol: str) -> float:
    """Probability of the first of a question's answers, given the mean NLL of each."""
    if not normalized:
        return float(np.exp(-nlls[0]))
    if protocol == OPEN_UNLEARNING:
        p = np.exp(-nlls)
        return float(p[0] / (p.sum() + EPSILON))
    return float(softmax(-nlls)[0])


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AnswerProbability(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=TOFU_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(
        self, predictions: list[list[float]], normalized: bool = False, protocol: str = TOFU
    ) -> dict[str, float]:
        check_protocol(protocol)
        rows = [finite_array(f"predictions[{i}]", row) for i, row in enumerate(predictions)]
        lonely = next((i for i, row in enumerate(rows) if len(row) < 2), None)
        if normalized and lonely is not None:
            raise ValueError(
                f"`normalized` needs wrong answers to choose from: `predictions[{lonely}]` has one answer."
            )
        values = finite_array("predictions", (answer_probability(row, normalized, protocol) for row in rows))
        return {"probability": float(values.mean())}
