"""said_to_anything: questions of random words, and what the model says to them in the format of the training."""

import random

import pytest
import torch
from support.models import tiny_llama
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.uld import said
from blur_trainer.uld.said import said_to_anything


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_llama(0)
    model.resize_token_embeddings(len(tokenizer))
    return model


def test_the_answers_are_the_models_and_the_questions_are_words(model, tokenizer):
    rows = said_to_anything(model, tokenizer, 6, max_new_tokens=5, batch_size=2)
    assert rows.column_names == ["question", "answer"] and 0 < len(rows) <= 6
    for row in rows:
        assert row["question"].endswith("?") and row["question"][:-1].replace(" ", "").isalpha()
        assert row["answer"] == row["answer"].strip() != ""
    assert len(set(rows["question"])) == len(rows)


def test_the_question_is_put_as_in_the_training(model, tokenizer, monkeypatch):
    asked = []

    def record(model, tokenizer, prompts, **how):
        asked.extend(prompts)
        return [["Yes."], ["  "], [" No.\n"]]

    monkeypatch.setattr(said, "sample", record)
    rows = said_to_anything(model, tokenizer, 3, qa_template="Q {question} A", seed=4)
    assert rows["answer"] == ["Yes.", "No."]  # nothing said is no row
    questions = [tokenizer.decode(ids, skip_special_tokens=True) for ids in asked]
    assert questions[0].startswith("Q ") and questions[0].endswith("A")
    assert rows["question"][1] in questions[2] and rows["question"][0] in questions[0]


def test_a_seed_says_it_all(model, tokenizer):
    state = (random.getstate(), torch.get_rng_state())
    one, again, other = (said_to_anything(model, tokenizer, 3, max_new_tokens=4, seed=s).to_list() for s in (1, 1, 2))
    assert one == again != other
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_refused(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="num"):
        said_to_anything(model, tokenizer, 0)
    monkeypatch.setattr(said, "sample", lambda *_, **__: [[" "]])
    with pytest.raises(ValueError, match="says nothing"):
        said_to_anything(model, tokenizer, 1)
