"""tune_weight: the grid's numbers against a literal loop over rows, tokens and words, what it chooses and refuses."""

import logging
import math
from itertools import product
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import LoraConfig
from support import reference
from support.models import examples, tiny_llama
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.models.logit_composition import COMPOSITIONS
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.uld.tuning import FILTERS, WEIGHTS, tune_weight

FORGET, RETAIN = examples(7, seed=1), examples(5, seed=2)
GRID = {"weights": (-0.5, -2.0, 0.3), "top_logit_filters": (0.0, 0.2)}
PAIRS = list(product(*GRID.values()))


def composed(composition):
    datasets.disable_progress_bars()
    target = tiny_llama(0, layers=3)
    assistant = lora_assistant(target, 1, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(5)
    for name, parameter in assistant.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return LogitDifferenceModel(LogitDifferenceConfig(composition=composition), target, assistant)


@pytest.fixture(params=COMPOSITIONS)
def model(request):
    return composed(request.param)


@pytest.fixture
def uld():
    return composed("uld")


def pair_of(row):
    return row["weight"], row["top_logit_filter"]


def tune(model, level=1.0, **kwargs):
    return tune_weight(model, FORGET, RETAIN, level, **{**GRID, "batch_size": 3, "progress": False, **kwargs})


def logits(model, row):
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"]])).logits[0].double()


def literal(rows, before, after):
    """Mean over the rows of the mean over answer tokens: -log q(y), and KL(p || q), one word at a time."""
    losses, changes = [], []
    for row in rows:
        p, q = before(row), after(row)
        answer = [(t, y) for t, y in enumerate(row["labels"][1:]) if y != -100]
        losses.append(sum(-math.log(q[t][y]) for t, y in answer) / len(answer))
        kl = [sum(a * math.log(a / b) for a, b in zip(p[t], q[t], strict=True)) for t, _ in answer]
        changes.append(sum(kl) / len(answer))
    return sum(losses) / len(losses), sum(changes) / len(changes)


def test_every_pairs_numbers_are_those_of_the_model_with_that_pair(model):
    tuning = tune(model)
    assert (model.config.weight, model.config.top_logit_filter) == (tuning.weight, tuning.top_logit_filter)
    assert [pair_of(row) for row in tuning.rows] == PAIRS
    for row in tuning.rows:
        model.config.weight, model.config.top_logit_filter = pair_of(row)
        parts = [lambda given, part=part: logits(part, given).softmax(-1).tolist() for part in (model.target, model)]
        assert row["forget"] == pytest.approx(literal(FORGET, *parts)[0], rel=1e-4)
        assert (row["retain"], row["change"]) == pytest.approx(literal(RETAIN, *parts), rel=1e-3, abs=1e-5)


def test_ulds_numbers_are_those_of_its_formula(uld):
    def before(row):
        return logits(uld.target, row).softmax(-1).tolist()

    for tried in tune(uld).rows:
        pair = pair_of(tried)

        def after(row, pair=pair):
            both = zip(logits(uld.target, row).tolist(), logits(uld.assistant, row).tolist(), strict=True)
            return [reference.logit_difference(*tokens, *pair) for tokens in both]

        assert tried["forget"] == pytest.approx(literal(FORGET, before, after)[0], rel=1e-4)
        assert (tried["retain"], tried["change"]) == pytest.approx(literal(RETAIN, before, after), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("place", range(len(PAIRS)))
def test_of_the_pairs_that_reach_the_level_the_one_that_changes_least_is_taken(uld, place):
    level = sorted(row["forget"] for row in tune(uld).rows)[place]
    tuning = tune(uld, level=SimpleNamespace(nats=level))
    reaching = [row for row in tuning.rows if row["forget"] >= level]
    assert len(reaching) == len(PAIRS) - place
    assert pair_of(min(reaching, key=lambda row: row["change"])) == (tuning.weight, tuning.top_logit_filter)
    assert (tuning.reached, tuning.level) == (True, level)


def test_a_level_out_of_reach_takes_the_nearest_and_says_so(uld, caplog):
    with caplog.at_level(logging.WARNING):
        tuning = tune(uld, level=50.0)
    best = max(tuning.rows, key=lambda row: row["forget"])
    assert (tuning.weight, tuning.top_logit_filter, tuning.reached) == (*pair_of(best), False)
    assert "level of 50 nats" in caplog.text and f"{best['forget']:.4g}" in caplog.text


def test_of_equals_the_least_weight_is_taken(uld):
    same = LogitDifferenceModel(LogitDifferenceConfig(), uld.target, lora_assistant(uld.target, 3))
    torch.nn.init.zeros_(same.target.lm_head.weight)  # then no weight changes anything
    tuning = tune(same, weights=(-2.0, -0.5, -1.0))
    assert same.config.weight == tuning.weight == -0.5


def test_the_choice_is_saved(uld, tmp_path):
    uld.config.target = "somewhere"
    uld.config.origins = {}
    tuning = tune(uld)
    uld.config.save_pretrained(tmp_path)
    saved = LogitDifferenceConfig.from_pretrained(tmp_path)
    assert (saved.weight, saved.top_logit_filter) == (tuning.weight, tuning.top_logit_filter)


def test_printed_it_is_a_table_of_what_was_tried(uld):
    tuning = tune(uld)
    head, _, *lines = str(tuning).splitlines()
    assert "forget loss" in head and "level 1" in head and len(lines) == len(PAIRS)
    (marked,) = [line for line in lines if "*" in line]
    assert marked.split("|")[1].strip() == f"{tuning.weight:.4g}"
    reached = [line.split("|")[6].strip() == "yes" for line in lines]
    assert reached == [row["forget"] >= 1.0 for row in tuning.rows]


def test_questions_and_answers_are_tokenized_as_for_training(uld):
    tokenizer = tiny_tokenizer()
    uld.target.resize_token_embeddings(len(tokenizer))
    model = LogitDifferenceModel(LogitDifferenceConfig(), uld.target, lora_assistant(uld.target, 1))
    rows = [{"question": "Who?", "answer": "Mara."}, {"question": "Where?", "answer": "In the harbour."}]
    tuning = tune_weight(model, rows, rows, 1.0, tokenizer, progress=False)
    assert len(tuning.rows) == len(WEIGHTS) * len(FILTERS)
    assert all(row["forget"] == row["retain"] for row in tuning.rows)


def test_modes_are_left_as_they_were(model):
    model.assistant.train()
    before = [module.training for module in model.modules()]
    tune(model)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"weights": ()}, "must each hold a number"),
        ({"weights": (math.inf,)}, "finite"),
        ({"top_logit_filters": (1.5,)}, r"\[0, 1\)"),
        ({"batch_size": 0}, "batch_size"),
        ({"level": 0.0}, "level"),
        ({"level": math.nan}, "level"),
        ({"level": "unseen"}, "a number"),
        ({"level": SimpleNamespace(nats=None)}, "a number"),
        ({"forget": []}, "empty"),
        ({"forget": [{"question": "Who?", "answer": "Me."}]}, "tokenizer"),
        ({"retain": [{"input_ids": [1] * 70, "labels": [1] * 70}]}, "max_position_embeddings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_leaves_the_model_as_it_was(uld, bad, message):
    before = (uld.config.weight, uld.config.top_logit_filter)
    arguments = {"forget": FORGET, "retain": RETAIN, "level": 1.0, "progress": False, **bad}
    with pytest.raises((ValueError, TypeError), match=message):
        tune_weight(uld, **arguments)
    assert (uld.config.weight, uld.config.top_logit_filter) == before
