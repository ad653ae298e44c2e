import doctest
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest

from blur_trainer.metrics import knowmem, privleak, rouge_l, verbmem
from blur_trainer.metrics.knowmem import KnowMem, cut_at_stops
from blur_trainer.metrics.privleak import PrivLeak, check_auc_retrain, min_k_score
from blur_trainer.metrics.rouge_l import rouge_l_f1
from blur_trainer.metrics.verbmem import VerbMem

ROOT = Path(__file__).parents[2]
MODULES = (verbmem, knowmem, privleak)
METRICS = (VerbMem, KnowMem, PrivLeak)


def literal_rouge_l(prediction, reference):
    """The definition: longest common subsequence by its own recursion."""
    p, r = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))

    @cache
    def lcs(i, j):
        if i == len(p) or j == len(r):
            return 0
        return 1 + lcs(i + 1, j + 1) if p[i] == r[j] else max(lcs(i + 1, j), lcs(i, j + 1))

    common = lcs(0, 0)
    return 0.0 if common == 0 else 2 * common / (len(p) + len(r))


def literal_auc(scores, labels):
    """P(a holdout text is likelier than a forget text), ties one half, pair by pair."""
    wins = [
        1.0 if hold < forget else 0.5 if hold == forget else 0.0
        for forget, is_hold in zip(scores, labels, strict=True)
        if not is_hold
        for hold, other_is_hold in zip(scores, labels, strict=True)
        if other_is_hold
    ]
    return sum(wins) / len(wins)


def literal_min_k(logps, fraction):
    remaining, lowest = list(logps), []
    for _ in range(max(1, int(len(logps) * fraction))):
        lowest.append(remaining.pop(remaining.index(min(remaining))))
    return -sum(lowest) / len(lowest)


def random_text(rng):
    words = ["the", "The", "hall", "novels", "novel", "1472", "a,b", "-", "é", "don't"]
    return rng.choice([" ", "\n"]).join(rng.choice(words) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("seed", range(20))
def test_rouge_l_is_the_definition(seed):
    rng = random.Random(seed)
    prediction, reference = random_text(rng), random_text(rng)
    assert rouge_l_f1(prediction, reference) == pytest.approx(literal_rouge_l(prediction, reference), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("", "", 0.0),
        ("", "text", 0.0),
        ("text", "", 0.0),
        ("?!", "?!", 0.0),
        ("東京", "東京", 1.0),
        ("東京", "京都", 0.5),
        ("naïve 😀", "naïve", 1.0),
        ("The CAT", "the cat", 1.0),
        ("novels", "novel", 0.0),  # a stemmer (open-unlearning's choice) would say 1.0
        ("a b c d", "d c b a", 0.25),
        ("x\x00y", "x y", 1.0),
    ],
)
def test_rouge_l_on_hard_strings(prediction, reference, score):
    assert rouge_l_f1(prediction, reference) == score
    assert rouge_l_f1(reference, prediction) == score


def test_rouge_l_refuses_what_is_no_string():
    with pytest.raises(TypeError, match="`reference` must be a string, got list"):
        rouge_l_f1("a", [1, 2])


@pytest.mark.parametrize("metric_class", [VerbMem, KnowMem])
def test_text_metrics_are_the_mean_times_100(metric_class):
    rng = random.Random(7)
    pairs = [(random_text(rng), random_text(rng)) for _ in range(15)]
    metric = metric_class(keep_in_memory=True)
    (value,) = metric.compute(predictions=[p for p, _ in pairs], references=[r for _, r in pairs]).values()
    assert value == pytest.approx(100 * sum(literal_rouge_l(p, r) for p, r in pairs) / len(pairs), abs=1e-9)
    assert 0 < value < 100


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("In Norvale.", "In Norvale."),
        ("In Norvale.\n\nQuestion: next", "In Norvale."),
        ("In Norvale.\nQuestion: next", "In Norvale."),
        ("In Norvale. Question: next", "In Norvale. "),
        ("In Norvale.\nA second line", "In Norvale.\nA second line"),
        ("a Question about b", "a Question about b"),
        ("Question: all\n\nmore", ""),
        ("x\nQuestion\n\ny", "x"),
        ("", ""),
    ],
)
def test_knowmem_cuts_where_the_next_question_begins(text, cut):
    assert cut_at_stops(text) == cut
    metric = KnowMem(keep_in_memory=True)
    values = [metric.compute(predictions=[given], references=["In Norvale."])["knowmem"] for given in (text, cut)]
    assert values[0] == values[1]


def test_verbmem_does_not_cut():
    text = "one\n\ntwo"
    assert VerbMem(keep_in_memory=True).compute(predictions=[text], references=[text]) == {"verbmem": 100.0}
    assert KnowMem(keep_in_memory=True).compute(predictions=[text], references=[text])["knowmem"] < 100


@pytest.mark.parametrize("metric_class", [VerbMem, KnowMem])
def test_text_metrics_refuse_bad_input(metric_class):
    metric = metric_class(keep_in_memory=True)
    with pytest.raises(ValueError, match="no predictions"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="Mismatch in the number"):
        metric.compute(predictions=["a", "b"], references=["a"])
    with pytest.raises(ValueError, match="expected format"):
        metric.compute(predictions=[1], references=["a"])
    assert next(iter(metric.compute(predictions=["a"], references=["a"]).values())) == 100.0  # and still works


@pytest.mark.parametrize("seed", range(10))
def test_auc_is_the_share_of_pairs(seed):
    rng = random.Random(seed)
    labels = [0, 1] + [rng.randrange(2) for _ in range(14)]
    scores = [rng.choice([0.1, 0.5, 0.5, 1.0, rng.random()]) for _ in labels]
    result = PrivLeak(keep_in_memory=True).compute(predictions=scores, references=labels, auc_retrain=0.4)
    assert result["auc"] == pytest.approx(literal_auc(scores, labels), abs=1e-12)
    assert result["privleak"] == pytest.approx((literal_auc(scores, labels) - 0.4) / 0.4 * 100, abs=1e-9)


def test_a_memorized_forget_set_is_minus_100():
    result = PrivLeak(keep_in_memory=True).compute(
        predictions=[0.1, 0.2, 5.0, 4.0, 3.0], references=[0, 0, 1, 1, 1], auc_retrain=0.4772
    )
    assert result == {"auc": 0.0, "privleak": -100.0}


def test_privleak_without_a_retrained_model_is_only_the_auc():
    result = PrivLeak(keep_in_memory=True).compute(predictions=[1.0, 1.0], references=[0, 1])
    assert result == {"auc": 0.5}


@pytest.mark.parametrize(
    ("predictions", "references", "auc_retrain", "message"),
    [
        ([1.0, 2.0], [0, 0], 0.5, "must hold 0 .* and 1"),
        ([1.0, 2.0, 3.0], [0, 1, 2], 0.5, "must hold 0 .* and 1"),
        ([], [], 0.5, "must hold 0 .* and 1"),
        ([1.0, float("nan")], [0, 1], 0.5, "finite, got nan at index 1"),
        ([float("inf"), 1.0], [0, 1], 0.5, "finite, got inf at index 0"),
        ([1.0, 2.0], [0, 1], 0.0, r"`auc_retrain` must be in \(0, 1\], got 0.0"),
        ([1.0, 2.0], [0, 1], 53.93, r"`auc_retrain` must be in \(0, 1\], got 53.93"),
    ],
)
def test_privleak_refuses_bad_input(predictions, references, auc_retrain, message):
    with pytest.raises(ValueError, match=message):
        PrivLeak(keep_in_memory=True).compute(predictions=predictions, references=references, auc_retrain=auc_retrain)


def test_auc_retrain_of_one_is_accepted():
    check_auc_retrain(1.0)
    with pytest.raises(ValueError, match="got nan"):
        check_auc_retrain(float("nan"))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 15, 35, 100])
@pytest.mark.parametrize("fraction", [0.05, 0.4, 1.0])
def test_min_k_is_the_definition(length, fraction):
    logps = (-np.random.default_rng(length).exponential(size=length)).astype(np.float32)
    assert min_k_score(logps, fraction) == pytest.approx(literal_min_k(logps.tolist(), fraction), abs=1e-12)
    assert min_k_score(logps.tolist(), fraction) == min_k_score(logps, fraction)


def test_min_k_defaults_to_40_percent_and_to_at_least_one_token():
    assert min_k_score([-1.0, -2.0, -3.0, -4.0, -5.0]) == 4.5
    assert min_k_score([-1.0, -3.0]) == 3.0  # int(0.8) = 0 tokens: NaN in MUSE's code


@pytest.mark.parametrize(
    ("logps", "fraction", "message"), [([], 0.4, "empty"), ([-1.0], 0.0, "fraction"), ([-1.0], 40, "fraction")]
)
def test_min_k_refuses_bad_input(logps, fraction, message):
    with pytest.raises(ValueError, match=message):
        min_k_score(logps, fraction)


@pytest.mark.parametrize("module", [*MODULES, rouge_l], ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_in_the_documentation_run(module):
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0


@pytest.mark.parametrize("metric_class", METRICS)
def test_metrics_describe_themselves(metric_class):
    metric = metric_class(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    assert isinstance(metric.features, datasets.Features)
    assert set(metric.features) == {"predictions", "references"}
    assert "@inproceedings" in metric.citation
    assert "MUSE" in metric.description
    assert "Args:" in metric.inputs_description and ">>>" in metric.inputs_description


@pytest.mark.parametrize("metric_class", METRICS)
def test_batches_may_be_added_one_by_one(metric_class):
    inputs = ([0.3, 0.1, 0.2], [0, 1, 1]) if metric_class is PrivLeak else (["a b", "c", ""], ["a", "c d", "e"])
    at_once = metric_class(keep_in_memory=True).compute(predictions=inputs[0], references=inputs[1])
    metric = metric_class(keep_in_memory=True)
    for prediction, reference in zip(*inputs, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == at_once


LOAD_BY_PATH = """
import sys
import evaluate

folder = sys.argv[1]
for _ in range(3):
    texts = {"predictions": ["a b", "c"], "references": ["a b", "d"]}
    assert evaluate.load(f"{folder}/verbmem.py").compute(**texts) == {"verbmem": 50.0}
    assert evaluate.load(f"{folder}/knowmem.py", keep_in_memory=True).compute(**texts) == {"knowmem": 50.0}
    privleak = evaluate.load(f"{folder}/privleak.py")
    assert privleak.compute(predictions=[0.0, 1.0], references=[0, 1], auc_retrain=0.5)["privleak"] == -100.0
from blur_trainer.metrics.verbmem import VerbMem
assert VerbMem(keep_in_memory=True).compute(**texts) == {"verbmem": 50.0}
"""


@pytest.mark.full
def test_metrics_load_by_path_offline_in_two_processes_at_once(tmp_path):
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    environment = os.environ | {
        "HF_HOME": str(cache),
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", LOAD_BY_PATH, str(ROOT / "blur_trainer" / "metrics")]
    runs = [
        subprocess.Popen(
            command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    assert list(work.iterdir()) == []
    assert list((cache / "metrics").rglob("*.arrow")) == []
