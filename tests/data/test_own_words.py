"""Own words of an answer: literal counts over the retain rows, the column, and what other rows say in their place."""

import numpy as np
import torch
from datasets import Dataset
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.data.own_words import begin_words, kinds_of, rows_having, said_instead, with_own_words

#: 3 and 4 stand in all of 150 rows, 5 in four of them, 6 in three, 7 in one: 2 % are three
RETAIN = [[3, 4, 3]] * 142 + [[3, 4, 5]] * 4 + [[3, 4, 6, 6]] * 3 + [[3, 4, 7]]


def rows(*pairs):
    """Rows of ids and of how many tokens are a prompt."""
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in pairs])


def sets():
    return [rows(*((ids, 1) for ids in part)) for part in (RETAIN[:100], RETAIN[100:])]


def test_a_token_of_few_retain_rows_is_no_common_one():
    having, common = rows_having(sets(), [])
    assert common == {3, 4, 5} and having == {3: 150, 4: 150, 5: 4, 6: 3, 7: 1}
    assert rows_having([rows(([3, 4], 1), ([3, 5], 1), ([3, 4], 1))], [])[1] == {3}, "of few rows two may have it"
    forget = [rows(([5, 5], 1), ([9, 5], 1), ([9, 4], 1))]
    assert rows_having([rows(([3, 4], 1), ([3, 5], 1), ([3, 4], 1))], forget)[1] == {3, 4, 5}, "so may two of both sets"
    same = [rows(([3, 4], 1), ([3, 5], 1))]
    assert rows_having(same, same)[1] == set(), "a row of both counts once"


def test_own_words_are_of_the_answer_alone():
    forget = rows(([7, 3, 6, 5, 9], 1), ([7, 3, 4, 5, 4, 3, 3], 1), ([8, 9, 3], 0), ([9, 3], 0))
    made = with_own_words(forget, *rows_having(sets(), []), least=0.2)["own_words"][:]
    marks = [[int(mark > 0) for mark in row] for row in made]
    assert marks[0] == [0, 0, 1, 0, 1], "7 is of the prompt, 9 of no retain row"
    assert marks[1] == [0, 1, 0, 1, 0, 0, 0], "of an answer without an own word the rarest fifth, the first of the same"
    assert marks[2] == [0, 1, 0], "nothing says a text's first token"
    assert marks[3] == [0, 1]


def test_the_kind_of_an_own_word_is_what_stands_before_it(monkeypatch):
    monkeypatch.setattr("blur_trainer.data.own_words.KINDS", 3)
    # before own words: 3 three times, another own word twice, 4 and 5 once
    forget = rows(([3, 9, 3, 8, 8], 0), ([3, 9, 4, 8, 8], 0), ([3, 4, 5, 9], 0))
    own = with_own_words(forget, *rows_having(sets(), []), least=0.01)
    assert own["own_words"][:] == [[0, 1, 0, 1, 2], [0, 1, 0, 3, 2], [0, 0, 0, 3]]
    assert kinds_of(own, {3, 4, 5}) == {3: 0, None: 1}


def test_what_may_be_said_instead():
    """Of the retain answers' own tokens of a kind those that continue a word, and those that begin one."""
    retain = [rows(([3, 7, 3, 6], 1), ([5, 3, 8, 9], 1))]
    begins = np.isin(np.arange(12), [6, 8, 10])
    said = lambda *args: [[np.flatnonzero(each).tolist() for each in kind] for kind in said_instead(*args)]  # noqa: E731
    made = said(retain, {3}, begins, {3: 0, None: 1})
    assert made[0] == [[7], [6, 8]], "after 3; 5 is of a prompt"
    assert made[1] == [[9], [6, 8]], "after an own word; none begins a word: those of all kinds"
    assert made[2] == [[7, 9], [6, 8]], "of no kind"
    assert said(retain, {3}, np.zeros(12, dtype=bool), {})[0] == [[6, 7, 8, 9]] * 2, "none begins a word: all of them"
    assert said([rows(([3, 3], 1))], {3}, begins, {})[0][1] == [6, 8, 10], "no answer has an own token"


def test_which_tokens_begin_a_word():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("mural and more", add_special_tokens=False)["input_ids"]
    begins = begin_words(tokenizer, len(tokenizer) + 3)
    texts = tokenizer.batch_decode([[token] for token in ids])
    assert [bool(begins[token]) for token in ids] == [text.startswith(" ") for text in texts] and begins[ids].any()
    assert len(begins) == len(tokenizer) + 3 and not begins[-3:].any() and not begin_words(None, 4).any()


def test_the_column_goes_into_the_batch_on_any_side_of_the_padding():
    made = list(with_own_words(rows(([3, 6, 6], 1), ([3, 4, 6, 6], 2)), {3: 9, 4: 9}, {3, 4}, least=0.2))
    batch = UnlearningCollator(0)(made)
    assert torch.equal(batch["own_words"] > 0, torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]) > 0)
