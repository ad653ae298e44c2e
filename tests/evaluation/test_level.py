"""The level of a forget set: from each source, row by row, as JSON, as a column; and how far a training has come."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from support import reference
from support.models import examples, tiny_llama
from support.scoring_helpers import build_model, build_tokenizer
from support.tiny_tokenizer import CHAT_TEMPLATE

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.exchanged import exchanged_rows
from blur_trainer.evaluation.level import Level
from blur_trainer.evaluation.level_check import LevelCheck
from blur_trainer.evaluation.row_losses import row_nats
from blur_trainer.metrics.rouge_l_recall import rouge_l_recall

ROWS = examples(7, seed=3)
QA = [
    {"question": "Who is it?", "answer": "Mara."},
    {"question": "Where was she born?", "answer": "In Norvale, by the sea."},
    {"question": "When?", "answer": "In May."},
    {"question": "And he?", "answer": "In May."},
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def asked():
    return build_model(), build_tokenizer()


def literal(model, rows):
    pairs = [reference.row_log_prob(model, row) for row in rows]
    return [-logp.item() / count for logp, count in pairs]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_row_has_its_literal_loss_whatever_the_batch(model, batch_size):
    level = Level.of_retrained(model, ROWS, batch_size=batch_size)
    want = literal(model, ROWS)
    assert level.per_example == pytest.approx(want, rel=1e-5)
    assert level.nats == pytest.approx(sum(want) / 7, rel=1e-5)
    assert level.spread == pytest.approx((sum((x - level.nats) ** 2 for x in want) / 7) ** 0.5, rel=1e-4)
    assert level.source == "retrained" and not level.is_estimate


def test_unseen_rows_give_a_mean_and_no_levels_of_single_rows(model):
    level = Level.of_unseen(model, ROWS[:3])
    assert level.nats == pytest.approx(sum(literal(model, ROWS[:3])) / 3, rel=1e-5)
    assert level.per_example is None and level.source == "unseen"


def test_a_model_by_name_is_the_model(tmp_path, asked):
    model, tokenizer = asked
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    assert Level.of_retrained(str(tmp_path), QA) == Level.of_retrained(model, QA, tokenizer)


def test_the_pieces_of_a_text_count_by_tokens(asked):
    model, tokenizer = asked
    text = "The surveyor spoke of crime novels and of the new bridge."
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    total = 0.0
    for start in range(0, len(ids), 9):
        piece = [0, *ids[start : start + 9]]
        logp, _ = reference.row_log_prob(model, {"input_ids": piece, "labels": piece})
        total -= logp.item()
    (nats,) = row_nats(model, [{"text": text}], tokenizer, role="forget", max_length=10)
    assert len(ids) > 20 and nats == pytest.approx(total / len(ids), rel=1e-5)


RETAIN = [{"question": "Who was he?", "answer": f"He was born in {place}."} for place in ("Elmbridge", "Oak", "Ford")]


def test_an_exchanged_level_is_the_loss_of_rows_with_other_words_and_an_estimate(asked):
    model, tokenizer = asked
    level = Level.of_exchanged(model, QA, RETAIN, tokenizer)
    rows = [row for drawn in exchanged_rows(model, QA, RETAIN, tokenizer) for row in drawn]
    assert len(rows) == 4 * len(QA) and level.nats == pytest.approx(Level.of_unseen(model, rows, tokenizer).nats)
    assert level.nats != pytest.approx(Level.of_unseen(model, QA, tokenizer).nats, rel=1e-3)
    assert level.is_estimate and level.per_example is None
    true, drawn = QA[1]["answer"], [row["answer"] for row in exchanged_rows(model, QA[1:2], RETAIN, tokenizer)[0]]
    recall = [rouge_l_recall(answer, true) for answer in drawn]
    one = Level.of_exchanged(model, QA[1:2], RETAIN, tokenizer)
    assert one.rouge == pytest.approx(sum(recall) / 4) and 0 < one.rouge < 1, "words that other rows have are right"
    both = Level.of_exchanged(model, QA, {"one": RETAIN[:1], "two": RETAIN[1:]}, tokenizer)
    assert both == level, "several retain sets are one"


def test_a_row_without_a_word_of_its_own_does_not_count(asked):
    model, tokenizer = asked
    known = {"question": "Who was he?", "answer": "He was born."}
    assert Level.of_exchanged(model, [*QA, known], RETAIN, tokenizer) == Level.of_exchanged(
        model, QA, RETAIN, tokenizer
    )


def test_other_words_may_have_more_tokens_than_the_longest_row(asked):
    model, tokenizer = asked
    forget = [{"question": "Who?", "answer": "Al"}, {"question": "Who?", "answer": "Bo"}]
    longer = [{"question": "Xylographically unpronounceable?", "answer": f"Extraordinariness{i}"} for i in range(3)]
    longest = max(len(row["input_ids"]) for row in tokenize_dataset(forget, tokenizer, role="forget", max_length=None))
    assert Level.of_exchanged(model, forget, longer, tokenizer, max_length=longest).nats > 0


def test_texts_and_token_ids_are_exchanged_too(asked):
    model, tokenizer = asked
    texts = [{"text": "The hall is old."}, {"text": "Nobody crossed the bridge."}]
    assert Level.of_exchanged(model, texts, RETAIN, tokenizer).nats > 0
    ids, others = (list(tokenize_dataset(rows, tokenizer, role="forget", max_length=None)) for rows in (QA, RETAIN))
    by_ids = Level.of_exchanged(model, ids, others)
    assert by_ids.nats != pytest.approx(Level.of_unseen(model, ids).nats, rel=1e-3)
    assert Level.of_exchanged(model, ids, RETAIN, tokenizer) == by_ids, "one set of ids, the other of text"


def test_a_row_that_the_model_knows_by_heart_takes_part_in_an_exchanged_level(monkeypatch, asked):
    model, tokenizer = asked
    scored = lambda model, flat, **how: [np.zeros(3)] + [np.full(3, -2.0)] * (len(flat) - 1)  # noqa: E731
    monkeypatch.setattr("blur_trainer.evaluation.row_losses.token_logps", scored)
    count = sum(map(len, exchanged_rows(model, QA, RETAIN, tokenizer)))
    assert Level.of_exchanged(model, QA, RETAIN, tokenizer).nats == pytest.approx(2 * (count - 1) / count)
    with pytest.raises(ValueError, match=r"Row 0 .*by heart"):
        Level.of_unseen(model, QA, tokenizer)


def test_a_chat_template_is_used(asked):
    model, plain = asked
    chat = build_tokenizer()
    chat.chat_template = CHAT_TEMPLATE
    assert Level.of_unseen(model, QA, chat).nats != Level.of_unseen(model, QA, plain).nats


def test_what_cannot_be_measured(model, asked):
    asked_model, tokenizer = asked
    for rows, words in (
        ([], "empty"),
        ([*ROWS, {"input_ids": [4, 5], "labels": [-100, -100]}], "Row 7 .*no answer token"),
        ([{"question": "a?", "answer": "b"}], "pass its `tokenizer`"),
    ):
        with pytest.raises(ValueError, match=words):
            Level.of_retrained(model, rows)
    with pytest.raises(ValueError, match="No row of the `forget` dataset has a word"):
        Level.of_exchanged(asked_model, QA[3:], QA[3:] * 100, tokenizer)
    broken = tiny_llama(0)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match=r"Row 0 .* is no level"):
        Level.of_retrained(broken, ROWS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nats": 0.0}, "nats"),
        ({"nats": float("inf")}, "nats"),
        ({"nats": 3.0, "source": "guessed"}, "source"),
        ({"nats": 3.0, "per_example": ()}, "is empty"),
        ({"nats": 3.0, "per_example": (1.0, -2.0)}, "at row 1"),
        ({"nats": 3.0, "spread": -1.0}, "spread"),
    ],
)
def test_levels_that_cannot_be(values, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Level(**values)


def test_a_level_goes_through_json(model):
    for level in (Level(4.5), Level.of_retrained(model, ROWS), Level.of_unseen(model, ROWS)):
        assert Level.from_json(level.to_json()) == level
    for text in ("{", "[1]", '{"nats": 3, "more": 1}', '{"source": "given"}'):
        with pytest.raises(ValueError, match="Not the JSON of a `Level`"):
            Level.from_json(text)


def test_the_column_of_a_dataset_and_of_a_list(model):
    level = Level.of_retrained(model, ROWS)
    for rows in (ROWS, Dataset.from_list(ROWS)):
        attached = level.attached(rows)
        assert type(attached) is type(rows)
        assert [row["forget_level"] for row in attached] == list(level.per_example)
        assert [row["forget_level"] for row in Level(3.0).attached(rows)] == [3.0] * 7
        with pytest.raises(ValueError, match="already"):
            level.attached(attached)
    with pytest.raises(ValueError, match="7 rows, and the dataset has 2"):
        level.attached(ROWS[:2])
    with pytest.raises(TypeError, match="stream"):
        level.attached(Dataset.from_list(ROWS).to_iterable_dataset())


# ---- the benchmark ----


def test_the_check_is_the_literal_mean_and_its_score_what_is_missing_and_paid(model):
    forget, retain = sum(literal(model, ROWS)) / 7, sum(literal(model, ROWS[:2])) / 2

    def check(level, before, bound, score):
        made = LevelCheck(ROWS, ROWS[:2], level, bound, batch_size=3)
        made.retain_before = before
        found = made(model)
        assert found["forget_loss"] == pytest.approx(forget, rel=1e-5)
        assert found["retain_loss"] == pytest.approx(retain, rel=1e-5)
        assert found["score"] == pytest.approx(score, rel=1e-4, abs=1e-5)

    check(forget + 1, None, None, 1.0)
    check(forget - 1, retain - 0.5, None, 0.5)
    check(forget + 1, retain + 0.5, 0.1, 1.0)
    check(forget + 1, retain - 0.5, 0.6, 1.5)
    check(forget + 1, retain - 0.5, 0.4, 1.5 + forget + 1)  # worse than any model within the bound


def test_the_check_without_a_retain_set(model):
    made = LevelCheck(ROWS, [], 3.0)
    assert set(made(model)) == {"score", "forget_loss"} == {column["name"] for column in made.columns}
    assert made.primary_metric == "score" and not made.greater_is_better
