"""Multiple choice: our number is lm-evaluation-harness's on the same rows, and nothing is left changed."""

import random
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from support.scoring_helpers import build_model, build_tokenizer

from blur_trainer.choices import choice_prompt
from blur_trainer.evaluation.lm_eval import LMEval, flat
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.evaluation.wmdp import WMDPEvaluation
from blur_trainer.metrics.choice_accuracy import ChoiceAccuracy


def rows(count=24, seed=0):
    draw = random.Random(seed)
    words = ["hall", "novel", "bridge", "surveyor", "東京", "two hundred", "x", "he left the hall in May"]
    return [
        {
            "question": f" What of the {draw.choice(words)} and the {draw.choice(words)} number {i}? ",
            "choices": draw.sample(words, 4),
            "answer": draw.randrange(4),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model(max_position_embeddings=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs the extra wmdp")
    folder = tmp_path_factory.mktemp('a folder\'s "tasks"')
    assert write_tasks(folder, {"forget_potions": Dataset.from_list(rows())}) == ["forget_potions"]
    return folder


def literal(model, tokenizer, row, subject):
    """One sequence at a time, nothing shared: the log-likelihood of each letter."""
    prompt = choice_prompt(row["question"], row["choices"], subject)
    found = []
    for letter in "ABCD":
        ids, start = tokenizer(f"{prompt} {letter}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(logps[t - 1, ids[t]].item() for t in range(start, len(ids))))
    return found


def test_the_prompt_is_the_harness_s():
    expected = (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "What?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert choice_prompt("  What?\n", ["one", "two", "three", "four"], "biology") == expected


def test_loglikelihoods_are_those_of_one_sequence_at_a_time(model, tokenizer):
    evaluation = WMDPEvaluation({"forget_bio": Dataset.from_list(rows(5))}, tokenizer, batch_size=2, progress=False)
    found = evaluation.loglikelihoods(model, "forget_bio")
    expected = [literal(model, tokenizer, row, "biology") for row in rows(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_longer_than_the_context_is_cut_on_the_left(tokenizer):
    short = build_model(max_position_embeddings=40)
    evaluation = WMDPEvaluation({"retain_x": Dataset.from_list(rows(2))}, tokenizer, progress=False)
    (first, _) = evaluation.loglikelihoods(short, "retain_x")
    prompt = choice_prompt(rows(1)[0]["question"], rows(1)[0]["choices"], "x")
    ids = tokenizer(f"{prompt} B")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logps = short(input_ids=torch.tensor([ids[-40:]])).logits[0].log_softmax(-1)
    scored = range(start - len(ids) + 40, 40)
    assert first[1] == pytest.approx(sum(logps[t - 1, ids[-40:][t]].item() for t in scored), rel=1e-4)


def test_equal_to_the_harness_and_nothing_is_left_changed(model, tokenizer, folder):
    ours = WMDPEvaluation({"forget_potions": Dataset.from_list(rows())}, tokenizer, batch_size=5, progress=False)
    benchmark = LMEval(["forget_potions"], tokenizer, include_path=folder, batch_size=3)
    model.train()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    theirs = benchmark(model)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert model.training and tokenizer.pad_token is None
    model.eval()
    assert theirs == {"forget_potions_acc": ours(model)["forget_potions_accuracy"]}
    assert 0 < theirs["forget_potions_acc"] < 1  # else the equality would say little


@pytest.mark.parametrize("seed", [1, 2])
def test_each_choice_is_the_harness_s(seed, tokenizer, folder):
    """Not only the mean: of each question, which letter is right or wrong."""
    model = build_model(seed, max_position_embeddings=512)
    ours = WMDPEvaluation({"forget_potions": Dataset.from_list(rows())}, tokenizer, progress=False)
    ours(model)
    hits = [sample["score"] for sample in ours.samples(24)]
    for n in (1, 7):
        theirs = LMEval(["forget_potions"], tokenizer, include_path=folder, limit=n)(model)
        assert theirs["forget_potions_acc"] == pytest.approx(sum(hits[:n]) / n)


def test_surface(model, tokenizer):
    data = {"forget_bio": Dataset.from_list(rows(3)), "retain_mmlu": Dataset.from_list(rows(4, seed=1))}
    evaluation = WMDPEvaluation(data, tokenizer, progress=False)
    with pytest.raises(ValueError, match="call the evaluation first"):
        evaluation.samples()
    values = evaluation(model)
    assert list(values) == evaluation.primary_metrics == [column["name"] for column in evaluation.columns]
    assert [(column["goal"], column["role"]) for column in evaluation.columns] == [
        ("min", "forget"),
        ("max", "retain"),
    ]
    samples = evaluation.samples(2)
    assert [sample["metric"] for sample in samples] == ["forget_bio_accuracy"] * 2 + ["retain_mmlu_accuracy"] * 2
    assert samples[0]["gt"][3:] == rows(1)[0]["choices"][rows(1)[0]["answer"]]
    assert "about biology." in samples[0]["prompt"] and "about mmlu." in samples[2]["prompt"]


@pytest.mark.parametrize(
    ("data", "subjects", "message"),
    [
        ({}, None, "no questions"),
        ({"bio": rows(1)}, None, "named `forget_"),
        ({"forget_": rows(1)}, None, "named `forget_"),
        ({"forget_bio": [{"question": "a"}]}, None, r"lacks \['choices', 'answer'\]"),
        ({"forget_bio": [rows(1)[0] | {"answer": 4}]}, None, "from 0 to 3"),
        ({"forget_bio": [rows(1)[0] | {"choices": ["a"]}]}, None, "1 choices"),
        ({"forget_bio": rows(1)}, {"cyber": "cars"}, "names \\['cyber'\\]"),
    ],
)
def test_bad_data(data, subjects, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        WMDPEvaluation({key: Dataset.from_list(r) for key, r in data.items()}, tokenizer, subjects=subjects)


def test_the_harness_is_asked_for_what_it_has(tokenizer, folder):
    with pytest.raises(ValueError, match=r"no tasks \['no_such_task'\]"):
        LMEval(["forget_potions", "no_such_task"], tokenizer, include_path=folder)
    for tasks in ("wmdp_bio", []):
        with pytest.raises(ValueError, match="a list of at least one name"):
            LMEval(tasks, tokenizer)


def test_the_harness_s_surface(tokenizer, folder):
    benchmark = LMEval(["forget_potions"], tokenizer, include_path=folder)
    assert benchmark.primary_metrics == [column["name"] for column in benchmark.columns] == ["forget_potions_acc"]
    assert [(column["goal"], column["role"]) for column in benchmark.columns] == [("min", "forget")]
    (column,) = LMEval(["forget_potions"], tokenizer, include_path=folder, forget=[]).columns
    assert (column["goal"], column["role"]) == ("max", "retain")
    assert benchmark.samples() == []
    with pytest.raises(ValueError, match="`forget` is"):
        LMEval(["forget_potions"], tokenizer, include_path=folder, forget=["mmlu"])


def test_tasks_of_bad_questions_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="no questions"):
        write_tasks(tmp_path / "x", {})
    with pytest.raises(ValueError, match="named `forget_"):
        write_tasks(tmp_path / "x", {"potions": Dataset.from_list(rows(1))})
    for topic in ("x/../../evil", "/etc/x", "x\n- evil: yes", "x: y", "", "x" * 300, "a\\b"):
        with pytest.raises(ValueError, match=r"is no plain file name|longer than a file|named `forget_"):
            write_tasks(
                tmp_path / "x", {"forget_y": Dataset.from_list(rows(1)), f"forget_{topic}": Dataset.from_list(rows(1))}
            )
    assert list(tmp_path.iterdir()) == []


def test_a_task_is_written_over_no_link(tmp_path):
    """What a link points to stays as it is."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "tasks").mkdir()
    for name in ("forget_x.yaml", "forget_x.jsonl"):
        (tmp_path / "tasks" / name).symlink_to(tmp_path / "mine")
    odd = "forget_yes # no"
    assert write_tasks(tmp_path / "tasks", {"forget_x": Dataset.from_list(rows(1)), odd: Dataset.from_list(rows(1))})
    assert (tmp_path / "mine").read_text() == "mine"
    for name in ("forget_x", odd):
        assert yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())["task"] == name


def test_without_the_harness_the_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'blur_trainer\[wmdp\]'"):
        LMEval(["wmdp_bio"], tokenizer)


def test_flat():
    results = {
        "wmdp_bio": {"alias": "wmdp_bio", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 3},
        "gsm8k": {"exact_match,strict-match": 0, "exact_match_stderr,strict-match": 0.1},
    }
    assert flat(results) == {"wmdp_bio_acc": 0.5, "gsm8k_strict-match_exact_match": 0.0}


@pytest.mark.parametrize(
    ("scores", "right", "accuracy"),
    [
        ([[-1.0, -2.0], [-3.0, -2.0, -1.0]], [0, 2], 1.0),
        ([[-2.0, -2.0]], [1], 0.0),  # the first of equals is chosen
        ([[-float("inf"), -5.0]], [1], 1.0),
    ],
)
def test_choice_accuracy(scores, right, accuracy):
    assert ChoiceAccuracy(keep_in_memory=True).compute(predictions=scores, references=right) == {"accuracy": accuracy}


@pytest.mark.parametrize(
    ("scores", "right"), [([], []), ([[1.0]], [0]), ([[0.0, float("nan")]], [0]), ([[0.0, 1.0]], [2])]
)
def test_choice_accuracy_refuses(scores, right):
    with pytest.raises(ValueError, match=r"predictions|references"):
        ChoiceAccuracy(keep_in_memory=True).compute(predictions=scores, references=right)


def test_lists_of_rows_are_sets_too(tokenizer, model, tmp_path):
    given, stream = rows(4), Dataset.from_list(rows(4)).to_iterable_dataset()
    ours = WMDPEvaluation({"forget_bio": given}, tokenizer, progress=False)
    assert ours(model) == WMDPEvaluation({"forget_bio": Dataset.from_list(given)}, tokenizer, progress=False)(model)
    assert write_tasks(tmp_path, {"forget_bio": given}) == ["forget_bio"]
    for wrong, kind in (("rows", "str"), (stream, "IterableDataset"), (["a"], "list of other things than dicts")):
        with pytest.raises(TypeError, match=f"`forget_bio` of `data` is a {kind}; it takes"):
            WMDPEvaluation({"forget_bio": wrong}, tokenizer)
    with pytest.raises(TypeError, match="`data` is a list"):
        WMDPEvaluation(given, tokenizer)
    with pytest.raises(ValueError, match="Row 1 of the set `forget_bio` has the columns"):
        WMDPEvaluation({"forget_bio": [given[0], {**given[1], "id": 1}]}, tokenizer)
