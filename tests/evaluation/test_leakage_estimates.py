"""leak@k and its bounds, against their definitions written out and numbers computed by hand."""

import math
from itertools import combinations, product
from statistics import fmean

import numpy as np
import pytest
from support.cases import every

from blur_trainer.evaluation.leakage.estimates import (
    at_k,
    clopper_pearson_upper,
    dkw_band,
    leak_at_k,
    mean_rate_upper,
    mean_score_upper,
)


def enumerated(n, c, k):
    """The share of the sets of `k` samples with a leak, one by one."""
    samples = [True] * c + [False] * (n - c)
    return fmean(any(chosen) for chosen in combinations(samples, k))


def test_leak_at_k_is_the_share_of_sets_with_a_leak():
    def check(n, c, k):
        assert leak_at_k(n, c, k) == pytest.approx(enumerated(n, c, k), abs=1e-15)

    every([(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)], check)


def test_leak_at_k_by_hand():
    # 5 samples, 2 leak: C(3,2) = 3 of C(5,2) = 10 pairs have no leak
    assert leak_at_k(5, 2, 2) == 0.7
    # 200 samples, 1 leaks: a set of k holds it in k of 200 cases
    assert [leak_at_k(200, 1, k) for k in (1, 2, 4, 128)] == [0.005, 0.01, 0.02, 0.64]
    assert leak_at_k(200, 0, 128) == 0 and leak_at_k(200, 73, 128) == 1  # fewer than 128 do not leak
    # 1 - (150 * 149) / (200 * 199)
    assert leak_at_k(200, 50, 2) == pytest.approx(1 - 22350 / 39800, abs=1e-15)


def test_leak_at_k_has_no_bias():
    """The mean over all outcomes of 4 samples that leak with p is 1 - (1 - p)^k."""
    p = 0.3
    for k in (1, 2, 3, 4):
        mean = sum(
            p ** sum(leaks) * (1 - p) ** (4 - sum(leaks)) * leak_at_k(4, sum(leaks), k)
            for leaks in product([0, 1], repeat=4)
        )
        assert mean == pytest.approx(at_k(p, k), abs=1e-12) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def tail(n, p, most):
    """P(Bin(n, p) <= most), by its definition."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(most + 1))


def test_clopper_pearson_is_where_the_binomial_tail_is_alpha():
    def check(n, successes, alpha):
        bound = clopper_pearson_upper(successes, n, alpha)
        assert tail(n, bound, successes) == pytest.approx(alpha, rel=1e-8)

    every([(1, 0, 0.01), (7, 3, 0.05), (20, 19, 0.01), (200, 0, 0.01), (200, 120, 0.2)], check)
    assert clopper_pearson_upper(7, 7) == 1
    # no leak in n samples: (1 - p)^n = alpha
    assert clopper_pearson_upper(0, 1, 0.01) == pytest.approx(0.99)
    assert clopper_pearson_upper(0, 2, 0.01) == pytest.approx(0.9)
    assert (
        clopper_pearson_upper(0, 200, 0.01) == pytest.approx(1 - 0.01 ** (1 / 200)) == pytest.approx(0.0228, abs=5e-5)
    )


def unequal(rates, n):
    """The distribution of the number of leaks in `n` samples of each question."""
    total = np.ones(1)
    for rate in rates:
        for _ in range(n):
            total = np.convolve(total, [1 - rate, rate])
    return total


def divided(total, questions):
    return [total // questions + (index < total % questions) for index in range(questions)]


def test_the_bound_of_the_mean_holds_for_questions_that_differ():
    """The probability that it is below the true mean is at most alpha, whatever the questions."""

    def check(rates, alpha):
        n = 5
        chances = unequal(rates, n)
        bounds = [mean_rate_upper(divided(total, len(rates)), n, alpha) for total in range(len(chances))]
        missed = [bound < fmean(rates) for bound in bounds]
        assert any(missed) and chances[missed].sum() <= alpha * (1 + 1e-9)

    every([([0.5, 0.5], 0.2), ([0.9, 0.3, 0.3], 0.1), ([1.0, 0.97], 0.2), ([0.02, 0.4, 1.0], 0.05)], check)
    assert mean_rate_upper([0], 7) == clopper_pearson_upper(0, 7)
    assert mean_rate_upper([3, 0, 1], 20) == clopper_pearson_upper(4, 60)
    assert mean_rate_upper([5, 4], 5) == mean_rate_upper([5, 5], 5) == 1


def test_the_bound_of_the_mean_bounds_every_k():
    rates = [0.01, 0.2, 0.9]
    for k in (1, 2, 8, 64):
        assert fmean(1 - (1 - rate) ** k for rate in rates) <= at_k(fmean(rates), k)
    assert at_k(1.0, 3) == 1 and at_k(0.0, 3) == 0


def test_the_band_by_hand():
    # alpha = e^-2 and n = 4: sqrt(2 / 8) = .5
    values, lower, upper = dkw_band([0.5, 0.0, 1.0, 0.5], alpha=math.exp(-2))
    assert values.tolist() == [0, 0.5, 0.5, 1]
    assert lower == pytest.approx([0, 0.25, 0.25, 0.5])  # F is .25 from 0 on, .75 from .5 on, 1 at 1
    assert upper == pytest.approx([0.75, 1, 1, 1])
    # 1 - (0 * .5 + .25 * .5): from .5 to 1 the lower side is .25
    assert mean_score_upper([0.5, 0.0, 1.0, 0.5], alpha=math.exp(-2)) == pytest.approx(0.875)
    assert mean_score_upper([0.0] * 200) == pytest.approx(math.sqrt(math.log(100) / 400))
    assert mean_score_upper([1.0] * 200) == 1


def test_the_band_holds_the_true_distribution():
    """Uniform scores, F(x) = x: the lower side is above it somewhere in at most a tenth of the draws."""
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        values, lower, _ = dkw_band(generator.random(30), alpha=0.1)
        missed += bool((lower > values).any())
    assert 0 < missed <= 0.1 * 400


def test_wrong_numbers_are_named():
    def check(words, call):
        with pytest.raises(ValueError, match=words):
            call()

    cases = [
        ("`k` is 5 of 4 samples", lambda: leak_at_k(4, 1, 5)),
        ("`k` is 0", lambda: leak_at_k(4, 1, 0)),
        ("5 of 4 samples", lambda: leak_at_k(4, 5, 1)),
        ("0 of 0 samples", lambda: clopper_pearson_upper(0, 0)),
        ("`alpha` is 0:", lambda: clopper_pearson_upper(0, 4, 0)),
        ("`alpha` is 0.6", lambda: dkw_band([0.5], 0.6)),
        ("`scores` is empty", lambda: dkw_band([])),
        ("`leaks` is empty", lambda: mean_rate_upper([], 4)),
        ("from 0 to 1, got -1 to 0.5", lambda: mean_score_upper([0.5, -1])),
    ]
    every(cases, check)
