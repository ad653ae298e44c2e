import doctest
import json
import math
import os
import random
import subprocess
import sys
import zlib
from fractions import Fraction
from functools import cache
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest

from blur_trainer.metrics import (
    answer_probability,
    exact_memorization,
    extraction_strength,
    forget_quality,
    membership,
    model_utility,
    rouge_l_recall,
    truth_ratio,
)
from blur_trainer.metrics.answer_probability import AnswerProbability
from blur_trainer.metrics.exact_memorization import ExactMemorization
from blur_trainer.metrics.extraction_strength import ExtractionStrength
from blur_trainer.metrics.forget_quality import ForgetQuality
from blur_trainer.metrics.membership import MembershipAUC, attack_scores, min_k_plus_plus_score, zlib_score
from blur_trainer.metrics.model_utility import ModelUtility
from blur_trainer.metrics.privleak import PrivLeak
from blur_trainer.metrics.rouge_l_recall import RougeLRecall
from blur_trainer.metrics.truth_ratio import TruthRatio, truth_ratios

ROOT = Path(__file__).parents[2]
METRICS = {
    AnswerProbability: ({"predictions": [[0.5, 1.0], [2.0, 0.1, 3.0]]}, {"normalized": True}),
    TruthRatio: ({"predictions": [0.5, 2.0], "references": [[1.0], [0.1, 3.0]]}, {"aggregation": "forget"}),
    ForgetQuality: ({"predictions": [0.5, 2.0, 0.1], "references": [0.7, 0.8, 0.9]}, {}),
    ModelUtility: ({"predictions": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}, {}),
    ExactMemorization: ({"predictions": [[1, 2, 3], [4]], "references": [[1, 5, 3], [4]]}, {}),
    ExtractionStrength: ({"predictions": [[1, 2, 3], [4]], "references": [[1, 5, 3], [4]]}, {}),
    MembershipAUC: ({"predictions": [0.3, 0.1, 0.2], "references": [0, 1, 1]}, {}),
    RougeLRecall: ({"predictions": ["a b", "c", ""], "references": ["a", "c d", "e"]}, {}),
}
MODULES = (
    *(answer_probability, truth_ratio, forget_quality, model_utility),
    *(exact_memorization, extraction_strength, membership, rouge_l_recall),
)


def compute(metric, **kwargs):
    return next(iter(metric(keep_in_memory=True).compute(**kwargs).values()))


# ---- slow, literal forms ----


def literal_probability(rows, normalized, epsilon):
    total = 0.0
    for right, *wrong in rows:
        p = math.exp(-right)
        total += p / (p + sum(math.exp(-nll) for nll in wrong) + epsilon) if normalized else p
    return total / len(rows)


def literal_truth_ratio(right, wrong, protocol):
    p = math.exp(-right)
    if protocol == "tofu-paper":
        return sum(math.exp(-nll) for nll in wrong) / len(wrong) / p
    geometric = math.prod(math.exp(-nll) for nll in wrong) ** (1 / len(wrong))
    return geometric / (p + (1e-10 if protocol == "open-unlearning" else 0.0))


def literal_ks_statistic(a, b):
    def share(values, x):
        return Fraction(sum(value <= x for value in values), len(values))

    return max(abs(share(a, x) - share(b, x)) for x in [*a, *b])


def literal_ks_p_value(a, b):
    """Of all the ways to deal distinct ranks to the two samples, the share that lie at least as far apart."""
    n, m, d = len(a), len(b), literal_ks_statistic(a, b)

    @cache
    def near(i, j):
        if abs(Fraction(i, n) - Fraction(j, m)) >= d:
            return 0
        if i == j == 0:
            return 1
        return (near(i - 1, j) if i else 0) + (near(i, j - 1) if j else 0)

    return 1 - Fraction(near(n, m), math.comb(n + m, n)) if d else 1


def literal_extraction_strength(predicted, true, floor):
    for k in range(len(true) + 1):
        if predicted[k:] == true[k:]:
            return max(1 - k / len(true), 1 / len(true) if floor else 0.0)
    raise AssertionError("the empty suffix is always predicted")


def literal_auc(scores, labels):
    forget = [score for score, label in zip(scores, labels, strict=True) if label == 0]
    holdout = [score for score, label in zip(scores, labels, strict=True) if label == 1]
    wins = [1.0 if f < h else 0.5 if f == h else 0.0 for f in forget for h in holdout]
    return sum(wins) / len(wins)


# ---- the metrics against them ----


@pytest.mark.parametrize(("protocol", "epsilon"), [("tofu", 0.0), ("open-unlearning", 1e-10)])
@pytest.mark.parametrize("normalized", [False, True])
def test_answer_probability_is_the_definition(normalized, protocol, epsilon):
    rng = random.Random(3)
    rows = [[rng.uniform(0, 20) for _ in range(rng.randrange(2, 6))] for _ in range(20)]
    ours = compute(AnswerProbability, predictions=rows, normalized=normalized, protocol=protocol)
    assert ours == pytest.approx(literal_probability(rows, normalized, epsilon), rel=1e-12)


def test_very_unlikely_choices_keep_their_order():
    rows = [[1000.0, 1000.0], [1000.0, 1000.0 + math.log(3)]]
    assert compute(AnswerProbability, predictions=rows, normalized=True) == pytest.approx((0.5 + 0.75) / 2, rel=1e-12)
    assert compute(AnswerProbability, predictions=rows, normalized=True, protocol="open-unlearning") == 0.0


@pytest.mark.parametrize("protocol", ["tofu", "tofu-paper", "open-unlearning"])
def test_truth_ratio_is_the_definition(protocol):
    rng = random.Random(4)
    right = [rng.uniform(0, 20) for _ in range(20)]
    wrong = [[rng.uniform(0, 20) for _ in range(rng.randrange(1, 6))] for _ in right]
    literal = [literal_truth_ratio(r, w, protocol) for r, w in zip(right, wrong, strict=True)]
    assert truth_ratios(right, wrong, protocol) == pytest.approx(np.array(literal), rel=1e-9)
    epsilon = 1e-10 if protocol == "open-unlearning" else 0.0
    forget = sum(min(ratio, 1 / (ratio + epsilon)) for ratio in literal) / len(literal)
    retain = sum(max(0.0, 1 - ratio) for ratio in literal) / len(literal)
    for aggregation, value in (("forget", forget), ("retain", retain)):
        ours = compute(TruthRatio, predictions=right, references=wrong, aggregation=aggregation, protocol=protocol)
        assert ours == pytest.approx(value, rel=1e-9)
        assert 0 < ours < 1


@pytest.mark.parametrize("right", [0.0, 5000.0])
@pytest.mark.parametrize("protocol", ["tofu", "tofu-paper"])
def test_truth_ratio_far_away_is_a_number(right, protocol):
    inputs = {"predictions": [right], "references": [[5000.0 - right]], "protocol": protocol}
    assert compute(TruthRatio, **inputs, aggregation="forget") == 0.0
    assert compute(TruthRatio, **inputs, aggregation="retain") == (1.0 if right == 0 else 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_forget_quality_is_the_exact_test(seed):
    rng = random.Random(seed)
    a, b = ([rng.lognormvariate(shift, 1) for _ in range(9)] for shift in (0, seed / 2))
    result = ForgetQuality(keep_in_memory=True).compute(predictions=a, references=b)
    assert result["ks_statistic"] == pytest.approx(float(literal_ks_statistic(a, b)), abs=1e-12)
    assert result["forget_quality"] == pytest.approx(float(literal_ks_p_value(a, b)), rel=1e-9)
    assert result["log10_forget_quality"] == pytest.approx(math.log10(literal_ks_p_value(a, b)), abs=1e-9)
    reciprocals = ForgetQuality(keep_in_memory=True).compute(
        predictions=[1 / x for x in a], references=[1 / x for x in b]
    )
    assert reciprocals == pytest.approx(result, rel=1e-12)  # TOFU's logs hold these


def test_forget_quality_of_models_that_share_nothing():
    low, high = [i / 1000 for i in range(400)], [1 + i / 1000 for i in range(399)] + [math.inf]
    result = ForgetQuality(keep_in_memory=True).compute(predictions=high, references=low)
    assert result["ks_statistic"] == 1.0
    assert result["log10_forget_quality"] == pytest.approx(math.log10(Fraction(2, math.comb(800, 400))), rel=1e-6)
    n = 2000  # 2 / C(4000, 2000) is below the smallest float
    result = ForgetQuality(keep_in_memory=True).compute(predictions=[2.0] * n, references=[1.0] * n)
    assert (result["forget_quality"], result["log10_forget_quality"]) == (0.0, -math.inf)


def test_model_utility_is_the_harmonic_mean():
    values = [0.1, 0.9, 0.3, 0.7, 0.5, 0.55, 0.45, 1.0, 0.2]
    literal = 1 / (sum(1 / value for value in values) / 9)
    assert compute(ModelUtility, predictions=values) == pytest.approx(literal, rel=1e-12)
    assert compute(ModelUtility, predictions=[*values[:8], 0.0]) == 0.0


def token_rows(seed):
    rng = random.Random(seed)
    true = [[rng.randrange(3) for _ in range(rng.randrange(2, 9))] for _ in range(30)]
    predicted = [[token if rng.random() < 0.7 else 9 for token in row] for row in true]
    return predicted, true


@pytest.mark.parametrize("protocol", ["tofu", "open-unlearning"])
@pytest.mark.parametrize("seed", range(3))
def test_memorization_is_the_definition(seed, protocol):
    predicted, true = token_rows(seed)
    inputs = {"predictions": predicted, "references": true, "protocol": protocol}
    other = protocol == "open-unlearning"
    pairs = [(p[:-1], t[:-1]) if other else (p, t) for p, t in zip(predicted, true, strict=True)]
    exact = [sum(a == b for a, b in zip(p, t, strict=True)) / len(t) for p, t in pairs]
    strength = [literal_extraction_strength(p, t, floor=other) for p, t in pairs]
    assert compute(ExactMemorization, **inputs) == pytest.approx(sum(exact) / 30, rel=1e-12)
    assert compute(ExtractionStrength, **inputs) == pytest.approx(sum(strength) / 30, rel=1e-12)


@pytest.mark.parametrize(
    ("predicted", "ours", "theirs"),
    [([1, 2, 3, 4], 1.0, 1.0), ([9, 9, 9, 9], 0.0, 1 / 3), ([1, 2, 3, 9], 0.0, 1.0), ([9, 2, 3, 4], 0.75, 2 / 3)],
)
def test_extraction_strength_at_the_ends(predicted, ours, theirs):
    inputs = {"predictions": [predicted], "references": [[1, 2, 3, 4]]}
    assert compute(ExtractionStrength, **inputs) == ours
    assert compute(ExtractionStrength, **inputs, protocol="open-unlearning") == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(5))
def test_membership_auc_is_the_share_of_pairs(seed):
    rng = random.Random(seed)
    labels = [0, 1] + [rng.randrange(2) for _ in range(14)]
    scores = [rng.choice([0.1, 0.5, 0.5, 1.0, rng.random()]) for _ in labels]
    ours = compute(MembershipAUC, predictions=scores, references=labels)
    assert ours == pytest.approx(literal_auc(scores, labels), abs=1e-12)
    assert compute(PrivLeak, predictions=scores, references=labels) == pytest.approx(1 - ours, abs=1e-12)


def test_scores_are_the_definitions():
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet(np.full(6, 0.3), size=11)
    probabilities[3] = [1.0, *[1e-30] * 5]  # no variance left: the floor counts
    probabilities[10] = [
        0.96,
        0.01,
        0.01,
        0.01,
        0.01,
        1e-40,
    ]  # the last token is the least likely: it must count or not
    tokens = rng.integers(6, size=11)
    tokens[3] = 0
    tokens[10] = 5
    logs = np.log(probabilities)
    logps = [float(logs[t, token]) for t, token in enumerate(tokens)]
    means = [sum(p * math.log(p) for p in row) for row in probabilities]
    variances = [sum(p * (math.log(p) - m) ** 2 for p in row) for row, m in zip(probabilities, means, strict=True)]
    assert min(variances) < 1e-6
    standardized = [(x - m) / math.sqrt(max(v, 1e-6)) for x, m, v in zip(logps, means, variances, strict=True)]
    for protocol, n in (("tofu", 11), ("open-unlearning", 10)):
        k = int(0.4 * n)
        assert attack_scores(logps, means, variances, "a text, a text", protocol) == pytest.approx(
            {
                "loss": -sum(logps) / 11,
                "zlib": -sum(logps) / 11 / len(zlib.compress(b"a text, a text")),
                "min_k": -sum(sorted(logps[:n])[:k]) / k,
                "min_k_plus_plus": -sum(sorted(standardized[:n])[:k]) / k,
            },
            rel=1e-9,
        )


def test_zlib_counts_bytes():
    assert zlib_score([-3.0], "é 東京") == 3.0 / len(zlib.compress("é 東京".encode()))


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("", "yes", 0.0),
        ("yes", "", 0.0),
        ("a b c d", "b d", 1.0),
        ("b d", "a b c d", 0.5),
        ("d c b a", "a b c d", 0.25),
        ("novels", "Novel", 1.0),  # the stemmer; MUSE has none
    ],
)
def test_rouge_l_recall(prediction, reference, recall):
    assert compute(RougeLRecall, predictions=[prediction], references=[reference]) == recall
    pair = {"predictions": [prediction, "same"], "references": [reference, "same"]}
    assert compute(RougeLRecall, **pair) == (recall + 1) / 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        (AnswerProbability, {"predictions": [[1.0, 2.0]], "protocol": "ou"}, r"one of \['tofu', 'open-unlearning'\]"),
        (AnswerProbability, {"predictions": [[1.0, 2.0], [1.0]], "normalized": True}, r"`predictions\[1\]` has one"),
        (AnswerProbability, {"predictions": [[1.0], []]}, r"`predictions\[1\]` is empty"),
        (AnswerProbability, {"predictions": []}, "`predictions` is empty"),
        (AnswerProbability, {"predictions": [[float("nan")]]}, "finite, got nan at index 0"),
        (TruthRatio, {"predictions": [1.0], "references": [[1.0]], "aggregation": "mean"}, "`aggregation` must be"),
        (
            TruthRatio,
            {"predictions": [1.0], "references": [[]], "aggregation": "forget"},
            r"`references\[0\]` is empty",
        ),
        (TruthRatio, {"predictions": [], "references": [], "aggregation": "forget"}, "`predictions` is empty"),
        (
            TruthRatio,
            {"predictions": [1.0], "references": [[1.0]], "aggregation": "forget", "protocol": "paper"},
            "'tofu-paper', 'open-unlearning'.*got 'paper'",
        ),
        (ForgetQuality, {"predictions": [], "references": []}, "`predictions` is empty"),
        (ForgetQuality, {"predictions": [1.0, float("nan")], "references": [1.0, 1.0]}, "got nan at index 1"),
        (ForgetQuality, {"predictions": [1.0], "references": [-0.5]}, "`references` must hold truth ratios.* got -0.5"),
        (ModelUtility, {"predictions": [0.5] * 10}, "nine numbers, got 10"),
        (ModelUtility, {"predictions": [0.5] * 8 + [50.0]}, "between 0 and 1"),
        (ExactMemorization, {"predictions": [[1]], "references": [[1, 2]]}, "Text 0 has 2 tokens but 1"),
        (ExactMemorization, {"predictions": [[]], "references": [[]]}, "Text 0 has no token"),
        (ExactMemorization, {"predictions": [], "references": []}, "no texts"),
        (
            ExtractionStrength,
            {"predictions": [[1]], "references": [[1]], "protocol": "open-unlearning"},
            "Text 0 has no token to score under 'open-unlearning', of the 1",
        ),
        (ExtractionStrength, {"predictions": [[1]], "references": [[1]], "protocol": "x"}, "`protocol` must be"),
        (MembershipAUC, {"predictions": [1.0, 2.0], "references": [0, 0]}, "must hold 0 .* and 1"),
        (MembershipAUC, {"predictions": [1.0, float("inf")], "references": [0, 1]}, "finite, got inf at index 1"),
        (RougeLRecall, {"predictions": [], "references": []}, "no predictions"),
    ],
)
def test_bad_input_is_refused(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric(keep_in_memory=True).compute(**inputs)


def test_functions_refuse_bad_input():
    with pytest.raises(ValueError, match="2 paraphrased answers but perturbed ones for 1"):
        truth_ratios([1.0, 2.0], [[1.0]])
    with pytest.raises(ValueError, match="Got 2 log-probabilities, 1 means and 2 variances"):
        min_k_plus_plus_score([-1.0, -2.0], [-1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="`protocol` must be one of"):
        attack_scores([-1.0], [-1.0], [1.0], "text", protocol="muse")


# ---- as `evaluate` metrics ----


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_in_the_documentation_run(module):
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize("metric_class", METRICS)
def test_metrics_describe_themselves(metric_class):
    metric = metric_class(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    assert isinstance(metric.features, datasets.Features)
    assert set(metric.features) == set(METRICS[metric_class][0])
    assert metric.citation.startswith("@")
    assert "Args:" in metric.inputs_description and ">>>" in metric.inputs_description


@pytest.mark.parametrize("metric_class", METRICS)
def test_batches_may_be_added_one_by_one(metric_class):
    inputs, options = METRICS[metric_class]
    at_once = metric_class(keep_in_memory=True).compute(**inputs, **options)
    metric = metric_class(keep_in_memory=True)
    for values in zip(*inputs.values(), strict=True):
        metric.add_batch(**{key: [value] for key, value in zip(inputs, values, strict=True)})
    assert metric.compute(**options) == at_once


LOAD_BY_PATH = """
import json, sys
import evaluate
for path, inputs, options, value in json.loads(sys.argv[1]):
    assert evaluate.load(path, keep_in_memory=True).compute(**inputs, **options) == value, path
"""


def test_metrics_load_by_path_offline(tmp_path):
    calls = []
    for metric, (inputs, options) in METRICS.items():
        path = str(ROOT.joinpath(*metric.__module__.split(".")).with_suffix(".py"))
        calls.append((path, inputs, options, metric(keep_in_memory=True).compute(**inputs, **options)))
    offline = {"HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = os.environ | offline | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD_BY_PATH, json.dumps(calls)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
