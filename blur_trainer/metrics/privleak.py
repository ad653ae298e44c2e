"""PrivLeak: can a membership inference attack tell that a model has seen the forget set?"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score

_CITATION = """\
@inproceedings{shi2025muse,
  title     = {{MUSE}: Machine Unlearning Six-Way Evaluation for Language Models},
  author    = {Shi, Weijia and Lee, Jaechan and Huang, Yangsibo and Malladi, Sadhika and Zhao, Jieyu and
               Holtzman, Ari and Liu, Daogao and Zettlemoyer, Luke and Smith, Noah A. and Zhang, Chiyuan},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
"""

_DESCRIPTION = """\
PrivLeak (MUSE, criterion 3): (AUC - AUC_retrain) / AUC_retrain x 100, where AUC is the probability that the Min-40%
score of a forget text is higher (the text is less likely) than that of a holdout text, and AUC_retrain the same for a
model that never saw the forget set. 0 is best: a memorized forget set has an AUC near 0, hence about -100
(under-unlearning); large positive values give it away as well (over-unlearning).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`):
        Min-40% scores, one per text: minus the mean of the lowest 40 % token log-probabilities (`min_k_score`).
    references (`list[int]`):
        0 for a text of the forget set, 1 for one of the holdout set. Both must occur.
    auc_retrain (`float`, *optional*):
        AUC of the model retrained without the forget set, in (0, 1].

Returns:
    `dict`: `{"auc": float}`, and `"privleak"` when `auc_retrain` is given (never against an assumed 0.5).

Example:

    >>> from blur_trainer.metrics.privleak import PrivLeak
    >>> privleak = PrivLeak(keep_in_memory=True)
    >>> privleak.compute(predictions=[0.1, 2.0, 1.0, 3.0], references=[0, 0, 1, 1], auc_retrain=0.5)
    {'auc': 0.25, 'privleak': -50.0}

"""


def min_k_score(logps: Sequence[float] | np.ndarray, fraction: float = 0.4) -> float:
    r"""
    Min-K% score of one text, in nats per token: low for a text that the model knows.

    $$s = -\frac{1}{k}\sum_{i=1}^{k} \ell_{(i)}, \qquad k = \max(1, \lfloor f\,T \rfloor)$$

    with $\ell_{(1)} \le \dots \le \ell_{(T)}$ the sorted log-probabilities of the text's tokens.

    Differs from MUSE: a text whose $\lfloor f T \rfloor$ is 0 is scored on its least likely token (there: NaN).

    Source: Shi et al., "Detecting Pretraining Data from Large Language Models" (2024).

    Args:
        logps (`Sequence[float]`):
            Log-probabilities of the text's tokens, shape (T,), T >= 1.
        fraction (`float`, *optional*, defaults to `0.4`):
            $f$, in (0, 1].

    Example:

    ```python
    >>> from blur_trainer.metrics.privleak import min_k_score
    >>> min_k_score([-1.0, -4.0, -0.5, -2.0, -0.25])
    3.0

    ```
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
    if len(logps) == 0:
        raise ValueError("`logps` is empty: a text needs at least one scored token (two tokens, or BOS and one).")
    k = max(1, int(len(logps) * fraction))
    return float(-np.sort(np.asarray(logps, dtype=np.float64))[:k].mean())


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PrivLeak(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2407.06460", "https://github.com/swj0419/muse_bench"],
        )

    def _compute(
        self, predictions: list[float], references: list[int], auc_retrain: float | None = None
    ) -> dict[str, float]:
        check_scores(predictions, references)
        # MUSE ranks by minus the score, so it predicts label 1 (holdout) for *likely* texts.
        auc = float(roc_auc_score(references, -np.asarray(predictions)))
        if auc_retrain is None:
            return {"auc": auc}
        check_auc_retrain(auc_retrain)
        return {"auc": auc, "privleak": (auc - auc_retrain) / auc_retrain * 100}


def check_scores(scores: Sequence[float], labels: Sequence[int]) -> None:
    """Raises unless all scores are finite and the labels are 0 (forget) and 1 (holdout), both present."""
    if set(labels) != {0, 1}:
        raise ValueError(
            f"`references` must hold 0 (forget) and 1 (holdout), both and nothing else, got {set(labels)}."
        )
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"`predictions` must be finite, got {scores[first]} at index {first}: the model that gave these "
            "scores has probably diverged. Check its loss before evaluating it."
        )


def check_auc_retrain(auc_retrain: float) -> None:
    """Raises unless `auc_retrain` is a number in (0, 1]: it is a divisor."""
    if not 0 < auc_retrain <= 1:
        raise ValueError(
            f"`auc_retrain` must be in (0, 1], got {auc_retrain}. Pass the `auc` of a model retrained without the "
            "forget set. (0 would mean that every forget text is likelier than every holdout text: not such a model.)"
        )
