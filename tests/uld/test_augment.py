"""Paraphrases keep the facts, perturbed answers lose them; columns, rules and callables; the same for a seed."""

import re
import time
from pathlib import Path

import pytest
from datasets import Dataset

from blur_trainer.data.tofu import load_tofu
from blur_trainer.toy.muse import muse_corpora
from blur_trainer.toy.tofu import tofu_corpora
from blur_trainer.uld.augment import paraphrases, perturbed_answers
from blur_trainer.uld.rewording import _facts, _replaced

SHARED = Path(__file__).parents[3] / "shared"
BOTH = pytest.mark.parametrize("augment", [paraphrases, perturbed_answers])
ROWS = [
    {"question": "Where was Ann Lee born?", "answer": "Ann Lee was born in York in 1950."},
    {"question": "Where was Bo Ray born?", "answer": "Bo Ray was born in Leeds in 1961."},
    {"question": "Who taught Ann Lee?", "answer": "Her teacher was Carl Dow."},
    {"question": "What does Bo Ray like?", "answer": "Mostly tea, and the sea."},
]


@pytest.fixture(scope="module")
def forget():
    return tofu_corpora()["forget"]


def pairs(rows):
    return [(row["question"], row["answer"]) for row in rows]


# ---------------------------------------------------------------------------------------------------- columns


def test_columns_as_lists():
    row = ROWS[0] | {"paraphrased_questions": ["q1", "q2", "q3"], "paraphrased_answers": ["a1", "a2"]}
    row |= {"perturbed_answer": ["x", "y", "z"]}
    assert pairs(paraphrases([row])) == [("q1", "a1"), ("q2", "a2")]
    assert pairs(paraphrases([row], num=1)) == [("q1", "a1")]
    assert pairs(paraphrases([row], num=9)) == [("q1", "a1"), ("q2", "a2")]
    assert pairs(perturbed_answers([row])) == [(row["question"], "x"), (row["question"], "y")]


def test_columns_as_the_hub_has_them():
    row = ROWS[0] | {"paraphrased_question": "q1", "paraphrased_answer": "a1", "perturbed_answer": "x"}
    assert pairs(paraphrases(Dataset.from_list([row]))) == [("q1", "a1")]
    assert pairs(perturbed_answers(Dataset.from_list([row]))) == [(row["question"], "x")]


def test_columns_of_the_embedded_set():
    data = tofu_corpora()["forget_perturbed"]
    assert pairs(paraphrases(data)) == [(r["paraphrased_question"], r["paraphrased_answer"]) for r in data]
    assert len(perturbed_answers(data, num=3)) == 3 * len(data)


@pytest.mark.parametrize(
    ("augment", "extra", "message"),
    [
        (paraphrases, {}, "no column 'paraphrased_questions' or 'paraphrased_question'"),
        (paraphrases, {"paraphrased_question": "q"}, "no column 'paraphrased_answers' or 'paraphrased_answer'"),
        (perturbed_answers, {}, r"no column 'perturbed_answer'.*\['answer', 'question'\].*by='rules'"),
        (perturbed_answers, {"perturbed_answer": []}, "gives no wrong answer for any of the 1 rows"),
        (perturbed_answers, {"perturbed_answer": ["x", f" {ROWS[0]['answer']}"]}, "row 0 equals the right one"),
    ],
)
def test_columns_that_are_not_there(augment, extra, message):
    with pytest.raises(ValueError, match=message):
        augment([ROWS[0] | extra])


@pytest.mark.parametrize("value", [3, [3], None])
def test_columns_of_another_type(value):
    with pytest.raises(TypeError, match=r"'perturbed_answer' in row 0 .* must be a string or a list of strings"):
        perturbed_answers([ROWS[0] | {"perturbed_answer": value}])


# ---------------------------------------------------------------------------------------------------- rules


def test_whole_facts_are_exchanged_of_two_that_begin_alike_the_longest():
    table = {"Ann": "Bob", "Ann Lee": "Eve Orr", "1,5": "2,5", "O'Neil": "Kim"}
    text = "Ann Lee met Ann, Anna and Ann-Marie in 1,5 and 11,5 (O'Neil)."
    assert _replaced(text, table) == "Eve Orr met Bob, Anna and Bob-Marie in 2,5 and 11,5 (Kim)."


def test_long_texts_take_no_quadratic_time():
    """Facts of a text are sought once per kind, words before them without a copy of the text."""
    facts = [f"N{i}x Or{i}" for i in range(1500)]
    text = " ".join(f"In {i} it was {fact}." for i, fact in enumerate(facts))
    start = time.process_time()
    perturbed_answers([{"text": text}, {"text": text.replace("x", "y")}], "rules", 1)
    assert time.process_time() - start < 4  # 40 s when it was quadratic


def test_facts_are_names_and_numbers():
    found = _facts("In the Hall, Ann Lee's 3 dogs met Bo Ray. The end came on June 4, 1990.")
    assert _facts("Mostly tea for Emily. Emily Ray had none.") == [("for", "Emily"), ("emily.", "Emily Ray")]
    assert [fact for _, fact in found] == ["Hall", "Ann Lee", "3", "Bo Ray", "June", "4", "1990"]
    assert {fact: before for before, fact in found}["Bo Ray"] == "met"


@pytest.mark.parametrize("num", [1, 2, 5, 20])
def test_paraphrases_keep_the_facts_in_other_words(forget, num):
    made = paraphrases(forget, "rules", num)
    assert len(made) == num * len(forget)
    for i, row in enumerate(forget):
        own = pairs(made.select(range(num * i, num * (i + 1))))
        assert len(set(own)) == num and (row["question"], row["answer"]) not in own
        for question, answer in own:
            for text, was in ((question, row["question"]), (answer, row["answer"])):
                assert {fact for _, fact in _facts(was)} <= {fact for _, fact in _facts(text)} | set(
                    re.findall(r"\w+", text)
                )
                assert set(re.findall(r"\w+", was.lower())) <= set(re.findall(r"\w+", text.lower()))


def test_a_definition_is_turned_round():
    row = {"question": "Where?", "answer": "The birthplace of Ann Lee is York."}
    assert paraphrases([row], "rules", 1)[0]["answer"] == "York is the birthplace of Ann Lee."


@pytest.mark.parametrize("num", [1, 3])
def test_wrong_answers_of_the_embedded_set(forget, num):
    """The same sentence about the same author, with the fact of another."""
    made = perturbed_answers(forget, "rules", num)
    assert len(made) == num * len(forget)
    for i, row in enumerate(forget):
        own = pairs(made.select(range(num * i, num * (i + 1))))
        subject = max((fact for _, fact in _facts(row["question"])), key=len)
        assert {question for question, _ in own} == {row["question"]}
        assert len({answer for _, answer in own}) == num
        for _, answer in own:
            assert answer != row["answer"] and subject in answer


def test_wrong_answers_step_by_step():
    wrong = {}
    for question, answer in pairs(perturbed_answers(ROWS, "rules", 1)):
        wrong[question] = answer
    # The same question about somebody else, with this one's name.
    assert wrong["Where was Ann Lee born?"] == "Ann Lee was born in Leeds in 1961."
    assert wrong["Where was Bo Ray born?"] == "Bo Ray was born in York in 1950."
    # Nobody else is asked that: the name is exchanged for another of two words that the question does not have.
    assert wrong["Who taught Ann Lee?"] == "Her teacher was Bo Ray."
    # No name to exchange: somebody else's answer.
    assert wrong["What does Bo Ray like?"] in [row["answer"] for row in ROWS[:3]]


@pytest.mark.parametrize("seed", range(5))
def test_a_name_is_exchanged_for_one_behind_the_same_word(seed):
    answers = ["he lived in York", "he lived in Leeds", "he met Bob", "he met Tim", "he was 31", "he was 47"]
    rows = [{"question": f"what about {i}th?", "answer": answer} for i, answer in enumerate(answers)]
    wrong = [answer for _, answer in pairs(perturbed_answers(rows, "rules", 1, seed))]
    assert wrong == [answers[i ^ 1] for i in range(6)]


def test_a_small_set_gives_what_it_can():
    assert len(perturbed_answers(ROWS[2:], "rules", 5)) == 2
    with pytest.raises(ValueError, match="by='rules' gives no wrong answer for any of the 1 rows"):
        perturbed_answers(ROWS[3:], "rules")


@BOTH
def test_rules_are_the_same_for_a_seed(augment, forget):
    made = pairs(augment(forget, "rules", seed=1))
    assert made == pairs(augment(forget, "rules", seed=1)) == pairs(augment(forget.to_list(), "rules", seed=1))
    assert made != pairs(augment(forget, "rules", seed=2))
    # A row's paraphrases depend on itself alone.
    if augment is paraphrases:
        assert pairs(augment(forget.select(range(5)), "rules", seed=1)) == made[:10]


def test_texts():
    data = muse_corpora()["raw_forget"]
    shorter, wrong = paraphrases(data, "rules", 2), perturbed_answers(data, "rules", 2)
    assert shorter.column_names == wrong.column_names == ["text"] and len(shorter) == len(wrong) == 2 * len(data)
    for i, text in enumerate(data["text"]):
        sentences = re.split(r"(?<=[.!?])\"?\s+", text)
        for part in shorter["text"][2 * i : 2 * i + 2]:
            assert sum(sentence in part for sentence in sentences) == (len(sentences) + 1) // 2
        for changed in wrong["text"][2 * i : 2 * i + 2]:
            facts = {fact for _, fact in _facts(text)}
            assert changed != text and len(facts & {fact for _, fact in _facts(changed)}) <= len(facts) / 3
    assert paraphrases([{"text": "one two three four"}], "rules", 1)[0]["text"] in (
        "one two",
        "two three",
        "three four",
    )


# ---------------------------------------------------------------------------------------------------- callables


@BOTH
def test_callable(augment):
    made = augment(
        ROWS, lambda row: [{"question": row["question"], "answer": str(i), "note": 1} for i in range(9)], num=3
    )
    assert pairs(made) == [(row["question"], str(i)) for row in ROWS for i in range(3)]
    assert made.column_names == ["question", "answer"]
    assert augment([{"text": "a"}], lambda row: [{"text": row["text"] * 2}]).to_list() == [{"text": "aa"}]


@BOTH
@pytest.mark.parametrize("made", [None, "text", [{"question": "q"}], [{"question": "q", "answer": 3}], ["q"]])
def test_callable_is_checked(augment, made):
    with pytest.raises(TypeError, match=r"for row 0: it must give a list of dicts with \['question', 'answer'\]"):
        augment(ROWS, lambda row: made)


def test_callable_must_be_wrong():
    assert len(paraphrases(ROWS, lambda row: [row])) == len(ROWS)
    with pytest.raises(ValueError, match="wrong answer of row 0 equals the right one"):
        perturbed_answers(ROWS, lambda row: [row])


# ---------------------------------------------------------------------------------------------------- arguments


@BOTH
@pytest.mark.parametrize("by", ["rule", "", None, 3])
def test_unknown_way(augment, by):
    with pytest.raises(ValueError, match=r"must be one of \['columns', 'rules'\] or a callable"):
        augment(ROWS, by)


@BOTH
@pytest.mark.parametrize("num", [0, -1, 1.5, "2"])
def test_number(augment, num):
    with pytest.raises(ValueError, match="whole number of rows, at least 1"):
        augment(ROWS, "rules", num)


@BOTH
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"input_ids": [1]}], ValueError, "`input_ids` format: only `question`"),
        ([{"prompt": "p", "completion": "c"}], ValueError, "`prompt-completion` format"),
        ([{"question": "q", "answer": None}], TypeError, "Column `answer` in row 0 .* is a NoneType"),
        ([], ValueError, "empty"),
        (Dataset.from_list(ROWS).to_iterable_dataset(), TypeError, "is a stream"),
        (tofu_corpora(), TypeError, "pick one of them"),
    ],
)
def test_other_sets_are_refused(augment, rows, error, message):
    with pytest.raises(error, match=message):
        augment(rows, "rules")


@BOTH
def test_columns_are_for_questions(augment):
    with pytest.raises(ValueError, match="for texts pass by='rules' or a callable"):
        augment([{"text": "a"}])


@pytest.mark.skipif(not (SHARED / "data" / "tofu").is_dir(), reason="real TOFU rows are not on this machine")
@pytest.mark.filterwarnings("ignore:.*wrong answers")
def test_real_tofu():
    data = load_tofu("tofu", "forget10", SHARED / "data" / "tofu")["forget_perturbed"]
    assert len(paraphrases(data)) == 800 and len(perturbed_answers(data)) == 797  # three rows have one wrong answer
    for augment in (paraphrases, perturbed_answers):
        assert len(set(pairs(augment(data, "rules")))) == 800
