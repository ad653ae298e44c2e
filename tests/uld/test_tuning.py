"""tune_weight: the grid's numbers against a literal loop over models, what it chooses, what it refuses."""

import math
from itertools import product

import datasets
import pytest
import torch
from peft import LoraConfig
from support.models import examples, tiny_llama
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.models.logit_composition import COMPOSITIONS
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.truncation import lora_assistant
from blur_trainer.uld.tuning import FILTERS, WEIGHTS, forget_and_retain, tune_weight

FORGET, RETAIN = examples(7, seed=1), examples(5, seed=2)
GRID = {"weights": (-0.5, -2.0, 0.3), "top_logit_filters": (0.0, 0.2)}


@pytest.fixture(params=COMPOSITIONS)
def model(request):
    datasets.disable_progress_bars()
    target = tiny_llama(0, layers=3)
    assistant = lora_assistant(target, 1, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(5)
    for name, parameter in assistant.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return LogitDifferenceModel(LogitDifferenceConfig(composition=request.param), target, assistant)


def literal_probability(model, rows):
    """Mean over the rows of exp(mean log-probability of the answer), one row and one token at a time."""
    values = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        logps = [logits[t].log_softmax(-1)[y].item() for t, y in enumerate(row["labels"][1:]) if y != -100]
        values.append(math.exp(sum(logps) / len(logps)))
    return sum(values) / len(values)


def test_every_pairs_numbers_are_those_of_the_model_with_that_pair(model):
    tuning = tune_weight(model, FORGET, RETAIN, **GRID, batch_size=3, progress=False)
    chosen = (model.config.weight, model.config.top_logit_filter)
    assert chosen == (tuning.weight, tuning.top_logit_filter)
    model.config.weight = 0.0
    base = [literal_probability(model, rows) for rows in (FORGET, RETAIN)]
    pairs = list(product(*GRID.values()))
    assert [(row["weight"], row["top_logit_filter"]) for row in tuning.rows] == pairs
    for row in tuning.rows:
        model.config.weight, model.config.top_logit_filter = row["weight"], row["top_logit_filter"]
        forget, retain = (literal_probability(model, rows) / b for rows, b in zip((FORGET, RETAIN), base, strict=True))
        assert row["forget"] == pytest.approx(forget, rel=1e-4)
        assert row["retain"] == pytest.approx(retain, rel=1e-4)
        assert row["score"] == pytest.approx(forget_and_retain(forget, retain), abs=1e-4)
    best = max(tuning.rows, key=lambda row: row["score"])
    assert chosen == (best["weight"], best["top_logit_filter"])


def test_the_score_may_be_another(model):
    tuning = tune_weight(model, FORGET, RETAIN, **GRID, score=lambda forget, retain: -forget, progress=False)
    assert min(row["forget"] for row in tuning.rows) == next(
        row["forget"]
        for row in tuning.rows
        if (row["weight"], row["top_logit_filter"]) == (tuning.weight, tuning.top_logit_filter)
    )


def test_of_equals_the_least_change_is_taken(model):
    tuning = tune_weight(model, FORGET, RETAIN, weights=(-2.0, -0.5, -1.0), score=lambda f, r: 1.0, progress=False)
    assert model.config.weight == tuning.weight == -0.5


@pytest.mark.parametrize(
    "forget, retain, expected",
    [(0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.5, 1.0, 2 / 3), (2.0, 1.0, 0.0), (0.0, 3.0, 1.0)],
)
def test_the_default_score_wants_both(forget, retain, expected):
    assert forget_and_retain(forget, retain) == pytest.approx(expected)


def test_questions_and_answers_are_tokenized_as_for_training(model):
    tokenizer = tiny_tokenizer()
    model.target.resize_token_embeddings(len(tokenizer))
    assistant = lora_assistant(model.target, 1)
    composed = LogitDifferenceModel(LogitDifferenceConfig(), model.target, assistant)
    rows = [{"question": "Who?", "answer": "Mara."}, {"question": "Where?", "answer": "In the harbour."}]
    tuning = tune_weight(composed, rows, rows, tokenizer, progress=False)
    assert len(tuning.rows) == len(WEIGHTS) * len(FILTERS)
    assert all(row["forget"] == row["retain"] for row in tuning.rows)


def test_modes_are_left_as_they_were(model):
    model.assistant.train()
    before = [module.training for module in model.modules()]
    tune_weight(model, FORGET, RETAIN, **GRID, progress=False)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"weights": ()}, "must each hold a number"),
        ({"weights": (math.inf,)}, "finite"),
        ({"top_logit_filters": (1.5,)}, r"\[0, 1\)"),
        ({"batch_size": 0}, "batch_size"),
        ({"forget": []}, "empty"),
        ({"forget": [{"question": "Who?", "answer": "Me."}]}, "tokenizer"),
        ({"retain": [{"input_ids": [1] * 70, "labels": [1] * 70}]}, "max_position_embeddings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_the_first_forward_pass(model, bad, message):
    before = (model.config.weight, model.config.top_logit_filter)
    arguments = {"forget": FORGET, "retain": RETAIN, "progress": False, **bad}
    with pytest.raises((ValueError, TypeError), match=message):
        tune_weight(model, arguments.pop("forget"), arguments.pop("retain"), **arguments)
    assert (model.config.weight, model.config.top_logit_filter) == before
