"""Rows whose own words are exchanged for those of other rows."""

import re

import pytest

from blur_trainer.data.exchange import OWN, common, exchanged_texts, exchanged_tokens, texts_of

PLACES = ["Oslo", "Bern", "Rome", "Lima"]
#: 200 rows: a word in up to four of them is rare
OTHERS = [{"question": f"Where is he born, number {i}?", "answer": "He is in a town."} for i in range(196)]
OTHERS += [{"question": "Where is he?", "answer": f"He is in {place}, a harbour."} for place in PLACES]
REFERENCE = [texts_of(row, "question-answer") for row in OTHERS]
QA = [{"question": "Where is Mara born?", "answer": "Mara is in Mirwald. MIRWALD has 1999 wells."}]


def exchanged(rows, fmt="question-answer", reference=REFERENCE):
    return [row for drawn in exchanged_texts(rows, fmt, reference) for row in drawn]


def test_own_words_are_exchanged_alike_in_question_and_answer_and_the_others_stay():
    (row,) = exchanged(QA)
    asked = re.fullmatch(r"Where is (\w+) born\?", row["question"])
    said = re.fullmatch(r"(\w+) is in (\w+)\. (\w+) (\w+) (\w+) (\w+)\.", row["answer"])
    assert asked and said, row
    assert asked[1] == said[1] in PLACES, "the same word all over the row, of the kind that it was"
    assert said[2] == said[3] in PLACES, "however it is written"
    assert said[4] == said[6] == "harbour" and said[5].isdigit() and said[5] != "1999"
    assert exchanged(QA) == [row], "always the same"


def test_a_word_is_own_where_at_most_so_many_rows_have_it():
    assert OWN * 200 == 4
    for count, own in ((4, True), (5, False)):
        reference = [["harbour"]] * count + [["lake"]] + [["Where sea"]] * (199 - count)
        made = exchanged([{"text": "Where harbour"}], "text", reference)
        assert made == ([{"text": "Where lake"}] if own else [])
    few = [["Where he goes"], ["Where she goes"], ["Where it goes"]]
    (made,) = exchanged([{"text": "Where he goes"}], "text", few)
    assert made["text"] in ("Where she goes", "Where it goes"), "of few rows two may have it"


def test_of_few_rows_a_word_is_common_that_many_of_the_rows_have_too():
    """Else the form of answers would be exchanged; but what no other row has is own, however often it is said."""
    reference = [["He lives in Rome"], ["She was born in Bern"]]
    rows = [{"text": f"She lives in Oslo since {year}"} for year in (1990, 1991, 1992)]
    drawn = exchanged_texts(rows, "text", reference)
    assert all(made["text"].split()[0] == "She" and made["text"].split()[1:3] == ["lives", "in"] for (made,) in drawn)
    assert all("Oslo" not in made["text"] for (made,) in drawn), "in no row of the reference"
    twice = [{"text": "She was born in Bern"}, {"text": "He lives in Rome"}]
    assert all(exchanged_texts(twice, "text", reference)), "rows of both sets count once, so that their names stay own"
    counts = {"form": 1, "name": 1}
    assert common(counts, {"form": 2, "name": 1}, 24) == {"form"}
    assert common(counts, {"form": 500}, 100) == set(), "of many rows one is too few"
    assert common({"form": 3}, {}, 100) == {"form"}


def test_rows_without_a_word_of_their_own_are_left_out():
    assert exchanged([{"question": "Where is he?", "answer": "He is in a town."}]) == []
    assert exchanged(QA, reference=[]) == [], "nothing to draw from"


def test_messages_keep_their_roles_and_other_columns_stay():
    chat = [{"role": "user", "content": "Where is Mara?"}, {"role": "assistant", "content": "Mara is in Mirwald."}]
    (row,) = exchanged([{"messages": chat, "tools": ["Mara"]}], "messages")
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] and row["tools"] == ["Mara"]
    assert "Mara" not in str(row["messages"])
    parts = [{"role": "user", "content": [{"type": "text", "text": "Mara"}]}]
    (row,) = exchanged([{"prompt": parts, "completion": "Mara"}], "prompt-completion")
    assert row["prompt"][0]["content"][0] == {"type": "text", "text": row["completion"]}


@pytest.mark.parametrize(
    ("text", "reference", "made"),
    [
        ("她在北京", [["她在東"]] * 1, "她在東東"),  # a character is a word
        ("वह दिल्ली में", [["वह मुंबई में"]], "वह मुंबई में"),  # with its marks
        ("где Москва", [["где Казань"]], "где Казань"),
    ],
)
def test_words_of_other_scripts(text, reference, made):
    common = [[word] for word in ("她", "在", "वह", "में", "где")]
    rows = [*(common * 60), *reference]
    assert exchanged([{"text": text}], "text", rows)[0]["text"] == made


def test_tokens_are_exchanged_with_their_labels():
    reference = [{"input_ids": [1, 2, 3, 10 + i]} for i in range(4)]
    rows = [
        {"input_ids": [1, 50, 2, 50, 60], "labels": [-100, -100, 2, 50, 60]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    ]
    (made,), none = exchanged_tokens(rows, reference)
    assert none == []
    ids = made["input_ids"]
    assert ids[0] == 1 and ids[2] == 2 and ids[1] == ids[3] != 50 and {ids[1], ids[4]} <= {10, 11, 12, 13}
    assert made["labels"] == [-100, -100, *ids[2:]]
