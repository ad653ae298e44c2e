"""Membership inference: how well a score tells the texts that a model was trained on from others."""

import zlib
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score

from blur_trainer.metrics.privleak import check_scores, min_k_score
from blur_trainer.metrics.protocols import OPEN_UNLEARNING, OPEN_UNLEARNING_CITATION, TOFU, check_protocol

_DESCRIPTION = """\
Membership inference AUC: the probability that the score of a forget text is lower (it looks more like a text of the
training data) than that of a holdout text, ties counting one half. 1: the attack always tells them apart, as on a model
that memorized the forget set; 0.5: it knows nothing.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`):
        Scores of one attack, one per text, low for a text that the model knows (`attack_scores`, or any other).
    references (`list[int]`):
        0 for a text of the forget set, 1 for one of the holdout set. Both must occur.

Returns:
    `dict`: `{"membership_auc": float}`. As in open-unlearning; PrivLeak's `auc`, as in MUSE, is 1 minus this.

Example:

    >>> from blur_trainer.metrics.membership import MembershipAUC
    >>> membership = MembershipAUC(keep_in_memory=True)
    >>> membership.compute(predictions=[0.1, 2.0, 1.0, 3.0], references=[0, 0, 1, 1])
    {'membership_auc': 0.75}

"""

MIN_VARIANCE = 1e-6  # open-unlearning's value, for positions where one token has all the probability


def min_k_plus_plus_score(
    logps: Sequence[float] | np.ndarray,
    means: Sequence[float] | np.ndarray,
    variances: Sequence[float] | np.ndarray,
    fraction: float = 0.4,
) -> float:
    r"""
    Min-K%++ score of one text, without unit: [`min_k_score`] of log-probabilities standardized by the model's own
    distribution at each position.

    $$z_t = \frac{\ell_t - \mu_t}{\sigma_t}, \qquad \mu_t = \mathbb{E}_{v \sim p_t}[\log p_t(v)], \qquad
    \sigma_t^2 = \max(10^{-6}, \mathrm{Var}_{v \sim p_t}[\log p_t(v)])$$

    Source: Zhang et al., "Min-K%++: Improved Baseline for Detecting Pre-Training Data from LLMs" (2025).

    Args:
        logps (`Sequence[float]`):
            Log-probabilities of the text's tokens, shape (T,), T >= 1.
        means (`Sequence[float]`):
            $\mu_t$, the negative entropy of the model's distribution at each position, shape (T,).
        variances (`Sequence[float]`):
            $\mathrm{Var}[\log p_t(v)]$, shape (T,).
        fraction (`float`, *optional*, defaults to `0.4`):
            Share of the tokens, the lowest ones, that counts.

    Example:

    ```python
    >>> from blur_trainer.metrics.membership import min_k_plus_plus_score
    >>> min_k_plus_plus_score([-1.0, -4.0], means=[-2.0, -2.0], variances=[1.0, 4.0])
    1.0

    ```
    """
    if not len(logps) == len(means) == len(variances):
        raise ValueError(f"Got {len(logps)} log-probabilities, {len(means)} means and {len(variances)} variances.")
    sigma = np.sqrt(np.maximum(np.asarray(variances, dtype=np.float64), MIN_VARIANCE))
    standardized = (np.asarray(logps, dtype=np.float64) - np.asarray(means, dtype=np.float64)) / sigma
    return min_k_score(standardized, fraction)


def zlib_score(logps: Sequence[float] | np.ndarray, text: str) -> float:
    r"""
    Mean negative log-likelihood of a text divided by its compressed size in bytes (nats per token and byte). A text
    that is likely only because it repeats itself scores high.

    Source: Carlini et al., "Extracting Training Data from Large Language Models" (2021).

    Example:

    ```python
    >>> from blur_trainer.metrics.membership import zlib_score
    >>> zlib_score([-10.0, -8.0], "x")  # 9 bytes when compressed
    1.0

    ```
    """
    return min_k_score(logps, fraction=1.0) / len(zlib.compress(text.encode()))


def attack_scores(
    logps: Sequence[float] | np.ndarray,
    means: Sequence[float] | np.ndarray,
    variances: Sequence[float] | np.ndarray,
    text: str,
    protocol: str = TOFU,
) -> dict[str, float]:
    """
    Scores of one text under the attacks `loss`, `zlib`, `min_k` and `min_k_plus_plus` (the last two: lowest 40 %).

    `logps`, `means` and `variances` are those of [`min_k_plus_plus_score`] over all tokens of the answer `text`. Under
    `protocol="open-unlearning"` the min-k attacks (not the loss) leave out the last token, the end of sequence.
    """
    check_protocol(protocol)
    last = -1 if protocol == OPEN_UNLEARNING else None
    return {
        "loss": min_k_score(logps, fraction=1.0),
        "zlib": zlib_score(logps, text),
        "min_k": min_k_score(logps[:last]),
        "min_k_plus_plus": min_k_plus_plus_score(logps[:last], means[:last], variances[:last]),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MembershipAUC(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=OPEN_UNLEARNING_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2506.12618", "https://github.com/locuslab/open-unlearning"],
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        check_scores(predictions, references)
        return {"membership_auc": float(roc_auc_score(references, np.asarray(predictions)))}
