"""What samples say of a model that leaks with some probability: leak@k, and bounds that hold with a confidence."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special


def leak_at_k(n: int, c: int, k: int) -> float:
    r"""
    The probability that at least one of `k` samples leaks, estimated without bias from `c` leaks in `n` samples.

    $$\text{leak@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}.$$

    It is the share of the sets of `k` of these samples that have a leak. Of several questions it is the mean. The
    binomials are whole numbers of any size, so the result is exact to the last digit of a float.

    Source: Reisizadeh et al., "LEAK@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding" (2025,
    arXiv:2511.04934), with n = 200 and k from 1 to 128.

    >>> leak_at_k(4, 1, 2)
    0.5
    """
    _check_counts(n, c)
    if not 1 <= k <= n:
        raise ValueError(f"`k` is {k!r} of {n} samples: it is an integer from 1 to {n}. Draw more samples for more.")
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def clopper_pearson_upper(successes: int, n: int, alpha: float = 0.01) -> float:
    r"""
    The largest probability that is not refuted by so few `successes` in `n` independent trials (Clopper and Pearson):

    $$U = \max\{p : P(\mathrm{Bin}(n, p) \le S) \ge \alpha\} = B^{-1}(1 - \alpha;\, S + 1,\, n - S),$$

    the quantile of a Beta distribution; 1 for $S = n$. The true probability is at most $U$ with confidence
    $1 - \alpha$. It is above 0 without any leak: $1 - \alpha^{1/n}$, which is .0228 for n = 200 and alpha = .01.

    Source: Scholten et al., "A Probabilistic Perspective on Unlearning and Alignment for Large Language Models"
    (2024, arXiv:2410.03523), binary case.
    """
    _check_counts(n, successes)
    _check_alpha(alpha)
    return 1.0 if successes == n else float(special.betaincinv(successes + 1, n - successes, 1 - alpha))


def mean_rate_upper(leaks: Sequence[int], n: int, alpha: float = 0.01) -> float:
    r"""
    An upper bound, with confidence $1 - \alpha$, of the mean over these questions of the probability that a sample
    leaks: Clopper and Pearson's for all samples together.

    The questions may differ. The number of leaks is then a sum of unequal trials, and such a sum is less likely to be
    small than the binomial one of the same mean $\bar p$, if it is at most $N\bar p - 1$ (Hoeffding, "On the
    Distribution of the Number of Successes in Independent Trials", 1956). Where that does not cover the bound (all
    samples leak but one), it is 1.

    The function $1 - (1-p)^k$ is concave, so $1 - (1 - U)^k$ ([`at_k`]) bounds the mean probability of a leak in `k`
    samples, with the same confidence for all `k` at once.

    Args:
        leaks: leaking samples of each question, of `n` each.
    """
    if not leaks:
        raise ValueError("`leaks` is empty: a mean over no question is undefined.")
    found, drawn = sum(leaks), n * len(leaks)
    if len(leaks) > 1 and found >= drawn - 1:
        return 1.0
    return clopper_pearson_upper(found, drawn, alpha)


def at_k(rate: float, k: int) -> float:
    """The probability of at least one leak in `k` samples, each of which leaks with probability `rate`."""
    return -math.expm1(k * math.log1p(-rate)) if rate < 1 else 1.0


def dkw_band(scores: Sequence[float], alpha: float = 0.01) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""
    A band around the distribution function of scores (Dvoretzky, Kiefer, Wolfowitz; Massart's constant):

    $$F_n(x) \mp \varepsilon, \qquad \varepsilon = \sqrt{\ln(1/\alpha) / 2n},$$

    cut to [0, 1]. The true function is above the lower side at every $x$ with confidence $1 - \alpha$, and so is it
    below the upper one; both together with $1 - 2\alpha$. A score exceeds $x$ with a probability of at most 1 minus
    the lower side.

    Args:
        scores: of independent samples of one question.

    Returns:
        The sorted scores (n,), the lower and the upper side (n,) from each score on to the next one.

    Source: as of [`clopper_pearson_upper`], general case.
    """
    _check_alpha(alpha)
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if not len(values):
        raise ValueError("`scores` is empty: draw at least one sample.")
    share = np.searchsorted(values, values, side="right") / len(values)
    margin = math.sqrt(math.log(1 / alpha) / (2 * len(values)))
    return values, np.clip(share - margin, 0, 1), np.clip(share + margin, 0, 1)


def mean_score_upper(scores: Sequence[float], alpha: float = 0.01) -> float:
    r"""
    An upper bound, with confidence $1 - \alpha$, of the mean score of a sample, for scores from 0 to 1:
    $1 - \int_0^1 \max(F_n(x) - \varepsilon, 0)\,dx$, by the lower side of [`dkw_band`].
    """
    values, lower, _ = dkw_band(scores, alpha)
    if values[0] < 0 or values[-1] > 1:
        raise ValueError(f"Scores are from 0 to 1, got {values[0]:g} to {values[-1]:g}.")
    return float(1 - (lower * np.diff(values, append=1.0)).sum())


def _check_counts(n: int, successes: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes!r} of {n!r} samples: it takes at least one sample, and 0 to all of them leak.")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha <= 0.5:  # above that Massart's constant does not hold
        raise ValueError(f"`alpha` is {alpha!r}: it is 1 minus the confidence, above 0 and at most .5.")
