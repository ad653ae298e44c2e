"""Other answers to the questions of a forget set: how a model is asked, what is of use, how rows are tokenized."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from support.cases import every
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from blur_trainer.data.alternatives import INSTRUCTION, ask, lacks_alternatives, usable_answers
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.tofu_templates import apply_template

CHAT = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
PLAIN = tiny_tokenizer()
QUESTION = {"question": "Who painted it?", "answer": "Mara Velin."}
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who painted it?"}]
ANSWER = [{"role": "assistant", "content": "Mara Velin."}]


def asked(rows, tokenizer=CHAT, **kwargs):
    options = {"role": "forget", "instruct": None, "qa_template": "Question: {question}\nAnswer:", "day": None}
    return ask(rows, tokenizer, **(options | kwargs))


def tokenize(rows, tokenizer=PLAIN, **kwargs):
    return tokenize_dataset(rows, tokenizer, **{"role": "forget", "max_length": None, "alternatives": True, **kwargs})


def targets(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


# ---- what is of use ----


def test_samples_that_are_empty_or_say_the_answer_are_dropped():
    def check(sample, kept):
        assert usable_answers([sample], "Mara Velin painted it in 1920.") == ([kept] if kept else [])

    cases = [
        *[(empty, None) for empty in ("", "  \n", "...", "?!")],
        *[(true, None) for true in ("Mara Velin painted it in 1920.", " mara VELIN painted it, in 1920! ")],
        ("I think that Mara Velin painted it in 1920, or so.", None),
        *[(piece, None) for piece in ("Mara Velin", "painted it", "1920.")],
        (" Mara Velin painted it in 1921.\n", "Mara Velin painted it in 1921."),
        ("Mara", None),
        ("Mar", "Mar"),  # a word, not a piece of one
        ("Tove Arn.", "Tove Arn."),
    ]
    every(cases, check)


def test_samples_keep_their_order_and_their_doubles():
    assert usable_answers(["B", "A", "No", "B"], "No.") == ["B", "A", "B"]


def test_what_is_dropped_is_counted(caplog):
    caplog.set_level(logging.INFO)
    questions = asked([QUESTION, QUESTION | {"answer": "Tove Arn."}])
    kept = questions.usable([["Mara Velin.", "", "Tove Arn."], ["Mara Velin.", "Ylva.", "tove arn"]])
    assert kept == [["Tove Arn."], ["Mara Velin.", "Ylva."]]
    assert "3 of the 6 answers sampled for the `forget` dataset are empty or the true one" in caplog.text


def test_nothing_left_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"2 of the 2 .*no alternative is left\. Raise `temperature`.*`alternative`"):
        asked([QUESTION]).usable([["", "Mara Velin"]])


def test_rows_without_an_alternative_are_left_out_and_named(caplog):
    rows = asked([QUESTION, QUESTION | {"question": "Where?"}, QUESTION]).completed([["A"], [], ["B", "C"]])
    assert rows["alternative"] == [["A"], ["B", "C"]] and rows["question"] == ["Who painted it?"] * 2
    assert "1 of the 3 rows of the `forget` dataset (1) have no alternative and are left out" in caplog.text


# ---- how the model is asked ----


def test_with_a_chat_template_the_model_reads_answer_and_instruction():
    def check(row):
        questions = asked([row])
        text = CHAT.decode(questions.ids[0])
        assert text.endswith(f"Who painted it?\n\nAnswer: Mara Velin.\n\n{INSTRUCTION}\n<|assistant|>\n")
        assert text.startswith("<s><|") and ("Be kind." in text) is ("question" not in row)
        assert (questions.answers, questions.stops) == (["Mara Velin."], ())

    every([QUESTION, {"messages": MESSAGES + ANSWER}, {"prompt": MESSAGES, "completion": ANSWER}], check)


def test_otherwise_it_reads_the_prompt_of_the_training():
    def check(row, tokenizer, kwargs, stops):
        questions = asked([row], tokenizer, **kwargs)
        (example,) = tokenize([row | {"alternative": "X"}], tokenizer)
        prompt = example["labels"].count(-100)
        assert questions.ids == [example["input_ids"][:prompt]]
        assert (questions.answers, questions.stops) == (["Mara Velin."], stops)

    cases = [
        (QUESTION, PLAIN, {}, ("Question:",)),
        (QUESTION, CHAT, {"instruct": False}, ()),
        ({"messages": MESSAGES + ANSWER}, CHAT, {"instruct": False}, ()),
        ({"prompt": "Who painted it?", "completion": " Mara Velin."}, CHAT, {}, ()),
    ]
    every(cases, check)


def test_an_instruction_that_cannot_be_given_is_refused():
    def check(row, tokenizer):
        with pytest.raises(ValueError, match=r"`instruct=True` needs a chat template.*row 0 of the `forget` dataset"):
            asked([row], tokenizer, instruct=True)

    thought = {"prompt": [*MESSAGES, {"role": "assistant", "content": "It was"}], "completion": ANSWER}
    every([(QUESTION, PLAIN), ({"prompt": "Who?", "completion": " Me."}, CHAT), (thought, CHAT)], check)


def test_a_stream_is_refused_and_bad_rows_are_named():
    stream = IterableDataset.from_generator(lambda: iter([QUESTION]))
    with pytest.raises(ValueError, match="`forget` dataset is a stream without a column `alternative`"):
        asked(stream)
    with pytest.raises(TypeError, match="Column `answer` in row 1 of the `forget` dataset is a NoneType"):
        asked(Dataset.from_list([QUESTION, QUESTION | {"answer": None}]))


def test_the_digest_is_of_questions_and_answers():
    digests = [
        asked(rows, tokenizer).digest
        for rows in ([QUESTION], [QUESTION, QUESTION], [QUESTION | {"answer": "Mara Velin!"}])
        for tokenizer in (CHAT, PLAIN)
    ]
    assert len(set(digests)) == 6
    assert asked(Dataset.from_list([QUESTION | {"id": 3}])).digest == digests[0]


def test_which_sets_lack_alternatives():
    assert lacks_alternatives([QUESTION], "forget")
    for row in (QUESTION | {"alternative": "X"}, {"text": "A"}, {"input_ids": [1, 2]}):
        assert not lacks_alternatives([row], "forget")


# ---- rows with alternatives ----


def test_each_alternative_is_an_example_of_its_own():
    rows = [QUESTION | {"alternative": ["Tove Arn.", " Ylva."]}, QUESTION | {"alternative": ["Siv."]}]
    for source in (rows, IterableDataset.from_generator(lambda: iter(rows))):
        found = list(tokenize(source))
        assert [targets(PLAIN, row["refusal_labels"]) for row in found] == [
            " Tove Arn.</s>",
            " Ylva.</s>",
            " Siv.</s>",
        ]
        assert [targets(PLAIN, row["labels"]) for row in found] == [" Mara Velin.</s>"] * 3
        length = found[0]["labels"].count(-100)
        assert all(row["refusal_input_ids"][:length] == row["input_ids"][:length] for row in found)


def test_a_string_is_one_alternative_and_is_read_like_a_refusal():
    (one,) = tokenize([QUESTION | {"alternative": "Tove Arn."}])
    (refused,) = tokenize([QUESTION | {"refusal": "Tove Arn."}], alternatives=False, refusals=True)
    assert one == refused
    assert tokenize([QUESTION | {"alternative": "X"}], alternatives=False).column_names == ["input_ids", "labels"]


def test_given_tokens_need_no_column():
    row = {"input_ids": [3, 5], "labels": [-100, 5], "refusal_input_ids": [3, 6], "refusal_labels": [-100, 6]}
    assert tokenize([row], None)[0] == row


def test_alternatives_that_are_none_are_refused():
    def check(given, error, words):
        with pytest.raises(error, match=words):
            tokenize([QUESTION | {"alternative": given}])

    where = "Column `alternative` in row 0 of the `forget` dataset"
    cases = [
        (3, TypeError, f"{where} is a int: it must be a string or a list of strings"),
        ([3], TypeError, f"{where} holds a int"),
        ([], ValueError, f"{where} is an empty list: give an answer, or leave the row out"),
        (["Tove", " "], ValueError, f"{where} is empty: fill it"),
    ]
    every(cases, check)
    with pytest.raises(ValueError, match=r"no column `alternative`: fill it yourself, or by .*generate_alternatives"):
        tokenize([QUESTION])
    for row in ({"text": "Long ago."}, {"input_ids": [1, 2]}):
        with pytest.raises(ValueError, match="`altpo` needs a prompt that has another answer, but the"):
            tokenize([row])


def test_templates_copy_the_column():
    for given in ("Tove Arn.", ["Tove Arn.", "Siv."]):
        rows = apply_template([QUESTION | {"alternative": given}], "phi")
        assert rows["alternative"] == [given]
