"""Truth Ratio: whether a model still tells a right answer from wrong ones of the same form."""

from collections.abc import Iterable

import datasets
import evaluate
import numpy as np
from scipy.special import logsumexp

from blur_trainer.metrics.protocols import EPSILON, OPEN_UNLEARNING, TOFU, TOFU_CITATION, check_protocol, finite_array

PAPER = "tofu-paper"

_DESCRIPTION = """\
Truth Ratio (TOFU): R = (how likely the perturbed, wrong answers are) / (how likely the paraphrased right answer is).
Aggregated as mean min(R, 1/R) on forget data (1: the model does not tell them apart) and as mean max(0, 1 - R) on other
data (1: it surely does). Between 0 and 1, higher is better in both.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`):
        Mean negative log-likelihood (nats per token) of each question's paraphrased right answer (Real Authors and
        World Facts: of the answer itself).
    references (`list[list[float]]`):
        The same of the question's perturbed answers, at least one.
    aggregation (`str`):
        `"forget"` or `"retain"` (everything else): see above.
    protocol (`str`, *optional*, defaults to `"tofu"`):
        See [`truth_ratios`].

Returns:
    `dict`: `{"truth_ratio": float}`.

Example:

    >>> from blur_trainer.metrics.truth_ratio import TruthRatio
    >>> truth_ratio = TruthRatio(keep_in_memory=True)
    >>> nlls = {"predictions": [1.0, 0.0], "references": [[1.0, 1.0], [800.0, 900.0, 1000.0]]}
    >>> truth_ratio.compute(**nlls, aggregation="forget")
    {'truth_ratio': 0.5}
    >>> truth_ratio.compute(**nlls, aggregation="retain")
    {'truth_ratio': 0.5}

"""


def truth_ratios(
    paraphrased: Iterable[float], perturbed: Iterable[Iterable[float]], protocol: str = TOFU
) -> np.ndarray:
    r"""
    Truth ratio of each question. [`ForgetQuality`] compares these between two models.

    $$R = \exp\Big(\tilde\ell - \frac{1}{K}\sum_{k=1}^{K} \hat\ell_k\Big)$$

    $\tilde\ell$ is the mean negative log-likelihood of the paraphrased answer, $\hat\ell_k$ that of a perturbed one. So
    the wrong answers' probabilities enter by their geometric mean, as in the benchmark's published aggregates.

    Differs between sources: TOFU's logs and its forget quality hold $1/R$; its paper and its `utils.py` take the
    arithmetic mean of the probabilities (`protocol="tofu-paper"`); open-unlearning has the geometric one over
    $e^{-\tilde\ell} + 10^{-10}$ (`protocol="open-unlearning"`).

    Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (2024), `aggregate_eval_stat.py`.

    Args:
        paraphrased (`Iterable[float]`):
            $\tilde\ell$ of each question.
        perturbed (`Iterable[Iterable[float]]`):
            $\hat\ell_k$ of each question.
        protocol (`str`, *optional*, defaults to `"tofu"`):
            `"tofu"`, `"tofu-paper"` or `"open-unlearning"`.

    Example:

    ```python
    >>> from blur_trainer.metrics.truth_ratio import truth_ratios
    >>> truth_ratios([1.0, 0.0], [[2.0, 0.0], [800.0, 900.0, 1000.0]]).tolist()
    [1.0, 0.0]

    ```
    """
    right, log_wrong = right_and_wrong(paraphrased, perturbed, protocol)
    if protocol == OPEN_UNLEARNING:
        return np.exp(log_wrong) / (np.exp(-right) + EPSILON)
    with np.errstate(over="ignore"):  # a right answer beyond 700 nats gives an infinite ratio, and min(R, 1/R) is 0
        return np.exp(right + log_wrong)


def right_and_wrong(
    paraphrased: Iterable[float], perturbed: Iterable[Iterable[float]], protocol: str
) -> tuple[np.ndarray, np.ndarray]:
    """NLL of the right answers, and log of the wrong answers' mean probability."""
    check_protocol(protocol, (TOFU, PAPER, OPEN_UNLEARNING))
    right = finite_array("predictions", paraphrased)
    rows = [-finite_array(f"references[{i}]", row) for i, row in enumerate(perturbed)]
    if len(rows) != len(right):
        raise ValueError(f"Got {len(right)} paraphrased answers but perturbed ones for {len(rows)} questions.")
    if protocol == PAPER:
        return right, np.array([logsumexp(row) - np.log(len(row)) for row in rows])
    return right, np.array([row.mean() for row in rows])


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TruthRatio(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=TOFU_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.List(datasets.Value("float64"))}
            ),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(
        self, predictions: list[float], references: list[list[float]], aggregation: str, protocol: str = TOFU
    ) -> dict[str, float]:
        if aggregation not in ("forget", "retain"):
            raise ValueError(f'`aggregation` must be "forget" or "retain", got {aggregation!r}.')
        ratios = truth_ratios(predictions, references, protocol)
        if aggregation == "retain":
            values = np.maximum(0.0, 1.0 - ratios)
        else:
            with np.errstate(divide="ignore"):  # if R = 0, 1/R is infinite and min(R, 1/R) is 0
                values = np.minimum(ratios, 1.0 / (ratios + (EPSILON if protocol == OPEN_UNLEARNING else 0.0)))
        return {"truth_ratio": float(values.mean())}
