"""Formats: what each column layout becomes, and every refusal to tokenize with its message."""

import logging
import random
from itertools import product

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from support.cases import every
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from blur_trainer.data.encoding import has_target, leading_special_ids, split_document
from blur_trainer.data.formats import chunk_documents, tokenize_dataset
from blur_trainer.data.refusals import REFUSALS

BOS, EOS = 0, 1
TEXT = "The harbour of Ostrava Bay was rebuilt twice, once after the storm and once after the fire. "
MESSAGES = [{"role": "user", "content": "Who painted it?"}, {"role": "assistant", "content": "Mara Velin."}]
ROWS = {
    "text": {"text": TEXT},
    "prompt-completion": {"prompt": "Who painted it?", "completion": " Mara Velin."},
    "conversational prompt-completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "messages": {"messages": MESSAGES},
    "question-answer": {"question": "Who painted it?", "answer": "Mara Velin."},
    "input_ids": {"input_ids": [0, 40, 41, 42, 1], "labels": [-100, -100, 41, 42, 1]},
}
WITH_PROMPT = [name for name in ROWS if name not in ("text", "input_ids")]


def tokenize(rows, tokenizer=None, **kwargs):
    tokenizer = tokenizer or tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    return tokenize_dataset(rows, tokenizer, **{"role": "forget", "max_length": None, **kwargs})


def targets(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# What each format becomes


def test_every_format_gives_tokens_and_labels_only():
    def check(name):
        result = tokenize([{**ROWS[name], "id": 7}])
        assert result.column_names == ["input_ids", "labels"]
        example = result[0]
        assert len(example["input_ids"]) == len(example["labels"])
        assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))
        assert has_target(example["labels"])
        assert example["input_ids"].count(BOS) == 1 and example["input_ids"].count(EOS) == 1

    every(ROWS.keys(), check)


def test_targets_decode_to_exactly_the_answer_and_eos():
    def check(name, template):
        tokenizer = tiny_tokenizer(chat_template=template)
        example = tokenize([ROWS[name]], tokenizer)[0]
        chat = template is not None and name != "prompt-completion"
        assert targets(tokenizer, example["labels"]) == ("Mara Velin.</s>" if chat else " Mara Velin.</s>")
        prompt = {
            "prompt-completion": "<s>Who painted it?",
            "question-answer": "<s>Question: Who painted it?\nAnswer:",
        }
        chat_prompt = "<s><|user|>\nWho painted it?\n<|assistant|>\n"
        n_prompt = example["labels"].count(-100)
        assert tokenizer.decode(example["input_ids"][:n_prompt]) == (chat_prompt if chat else prompt[name])
        assert example["labels"][:n_prompt] == [-100] * n_prompt

    every([*product(WITH_PROMPT, [CHAT_TEMPLATE]), ("prompt-completion", None), ("question-answer", None)], check)


def test_text_is_all_target_and_ends_with_eos():
    tokenizer = tiny_tokenizer()
    example = tokenize([ROWS["text"]], tokenizer)[0]
    assert example["input_ids"] == example["labels"] == [BOS, *ids(tokenizer, TEXT), EOS]


def test_input_ids_pass_through_and_labels_default_to_them():
    assert tokenize([{"input_ids": [5, 6, 7]}])[0] == {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert tokenize([ROWS["input_ids"]])[0] == ROWS["input_ids"]


def test_input_ids_keep_the_columns_that_belong_to_them():
    row = {"refusal_input_ids": [3, 4], "refusal_labels": [-100, 4], "ref_logps": -1.5, "refusal_ref_logps": -2.5}
    result = tokenize([{"input_ids": [3, 5], "labels": [-100, 5], "id": "x", **row}], refusals=True)
    assert result[0] == {"input_ids": [3, 5], "labels": [-100, 5], **row}


def test_scores_of_a_longer_sequence_are_not_kept_for_a_cut_one():
    with pytest.raises(ValueError, match=r"Row 0 .*max_length=3.*ref_logps.*raise `max_length`"):
        tokenize([{"input_ids": [3, 5, 6, 7], "ref_logps": -1.5}], max_length=3)


def test_multi_turn_messages_train_on_the_last_answer_only():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "user", "content": "When?"}]
    example = tokenize([{"messages": [*turns, {"role": "assistant", "content": "In spring."}]}], tokenizer)[0]
    assert targets(tokenizer, example["labels"]) == "In spring.</s>"
    assert "Mara Velin." in tokenizer.decode(example["input_ids"])


def test_qa_template_is_text_but_for_the_question():
    tokenizer = tiny_tokenizer()
    example = tokenize([{"question": "Who {x}?", "answer": "Me"}], tokenizer, qa_template='{"q": "{question}"}')[0]
    assert tokenizer.decode(example["input_ids"]) == '<s>{"q": "Who {x}?"} Me</s>'


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tiny_tokenizer(chat_template="{{ mood }}" + CHAT_TEMPLATE)
    example = tokenize([{"messages": MESSAGES, "chat_template_kwargs": {"mood": "calm"}}], tokenizer)[0]
    assert tokenizer.decode(example["input_ids"]).startswith("calm<s>")


# BOS, EOS, boundary


def test_bos_as_the_tokenizer_has_it_and_one_eos():
    def check(name, add_bos, add_eos):
        tokenizer = tiny_tokenizer(add_bos=add_bos, add_eos=add_eos)
        assert leading_special_ids(tokenizer) == ([BOS] if add_bos else [])
        tokens = tokenize([ROWS[name]], tokenizer)[0]["input_ids"]
        assert (tokens[0] == BOS) is add_bos and tokens.count(BOS) == int(add_bos)
        assert tokens[-1] == EOS and tokens.count(EOS) == 1

    every(product(["text", "prompt-completion", "question-answer"], [True, False], [True, False]), check)


def test_bos_and_eos_spelt_in_the_text_are_not_doubled():
    for row in ({"text": "<s>" + TEXT + "</s>"}, {"prompt": "<s>Who?", "completion": " Me.</s>"}):
        tokens = tokenize([row], tiny_tokenizer())[0]["input_ids"]
        assert tokens.count(BOS) == 1 and tokens[0] == BOS
        assert tokens.count(EOS) == 1 and tokens[-1] == EOS


def test_no_eos_where_the_tokenizer_has_none():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert tokenize([ROWS["text"]], tokenizer)[0]["input_ids"] == [BOS, *ids(tokenizer, TEXT)]


def test_a_token_that_merges_over_the_boundary_is_a_target():
    tokenizer = tiny_tokenizer()
    prompt, completion = "T", "hird"
    merged = ids(tokenizer, "Third")
    assert merged[: len(ids(tokenizer, prompt))] != ids(tokenizer, prompt), "the fixture has to merge 'Th'"
    example = tokenize([{"prompt": prompt, "completion": completion}], tokenizer)[0]
    assert example == {"input_ids": [BOS, *merged, EOS], "labels": [-100, *merged, EOS]}


# max_length


def test_pieces_concatenate_to_the_document():
    def check(add_bos, max_length, repeats):
        tokenizer = tiny_tokenizer(add_bos=add_bos)
        prefix = [BOS] if add_bos else []
        texts = [TEXT * repeats + "x" * cut for cut in range(12)]  # all remainders
        result = tokenize([{"text": text} for text in [*texts, "z"]], tokenizer, max_length=max_length)
        pieces = list(result["input_ids"])
        assert all(piece[: len(prefix)] == prefix and 2 <= len(piece) <= max_length for piece in pieces)
        joined = [token for piece in pieces for token in piece[len(prefix) :]]
        assert joined == [token for text in [*texts, "z"] for token in (*ids(tokenizer, text), EOS)]
        assert all(EOS not in piece[:-1] for piece in pieces), "a piece of two documents"
        assert all(has_target(labels) for labels in result["labels"])

    every(product([True, False], [3, 4, 5, 7, 16, 31, 1000], [1, 2, 5]), check)


def test_as_few_pieces_as_fit():
    assert [len(piece) for piece in split_document(list(range(10)), [BOS], 5)] == [5, 5, 3]
    assert [len(piece) for piece in split_document(list(range(9)), [], 4)] == [4, 3, 2]  # not 4, 4, 1
    assert split_document([], [BOS], 5) == [[BOS]]


def test_other_formats_are_cut_on_the_right():
    tokenizer = tiny_tokenizer()
    whole = tokenize([ROWS["prompt-completion"]], tokenizer)[0]
    for max_length in range(whole["labels"].count(-100) + 1, len(whole["labels"])):
        cut = tokenize([ROWS["prompt-completion"]], tokenizer, max_length=max_length)[0]
        assert cut == {column: values[:max_length] for column, values in whole.items()}


def test_examples_without_a_target_are_counted_and_named():
    rows = [{"prompt": "x" * (50 if i % 2 else 1), "completion": " y"} for i in range(20)]
    with pytest.raises(ValueError) as error:
        tokenize(rows, tiny_tokenizer(), role="retain", max_length=12)
    message = str(error.value)
    for part in ("10 of the 20", "`retain`", "1, 3, 5, 7, 9, ...", "max_length=12", "drop_empty=True"):
        assert part in message
    assert "\n" not in message


def test_drop_empty_drops_them_with_a_warning(caplog):
    rows = [{"prompt": "x" * (50 if i % 2 else 1), "completion": f" y{i}"} for i in range(6)]
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        result = tokenize(rows, tiny_tokenizer(), max_length=12, drop_empty=True)
    assert [list(e["input_ids"]) for e in result] == [
        tokenize([rows[i]], tiny_tokenizer())[0]["input_ids"] for i in (0, 2, 4)
    ]
    assert "3 of the 6" in caplog.text and "1, 3, 5" in caplog.text
    with pytest.raises(ValueError, match="none remain"):
        tokenize(rows[1::2], tiny_tokenizer(), max_length=12, drop_empty=True)


def test_nothing_is_said_when_nothing_is_dropped(caplog):
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        tokenize([ROWS["text"]], drop_empty=True)
    assert caplog.text == ""


def test_a_label_at_position_zero_is_no_target():
    def check(labels, expected):
        assert has_target(labels) is expected
        row = {"input_ids": [5] * len(labels), "labels": labels}
        if expected:
            assert len(tokenize([row])) == 1
        else:
            with pytest.raises(ValueError, match="no answer token left"):
                tokenize([row])

    every([([5], False), ([5, -100], False), ([-100, 5], True), ([], False)], check)


def test_a_refusal_cut_away_counts_too():
    with pytest.raises(ValueError, match="1 of the 1"):
        tokenize([{"input_ids": [3, 4], "refusal_input_ids": [3, 4], "refusal_labels": [-100, -100]}], refusals=True)


def test_max_length_too_short_to_hold_a_target():
    for max_length in (-1, 0, 1):
        with pytest.raises(ValueError, match="at least 2"):
            tokenize([ROWS["text"]], max_length=max_length)


# Datasets, streams, processes


def test_list_dataset_stream_and_processes_agree():
    def check(name):
        rows = [ROWS[name]] * 5
        kwargs = {"max_length": 40, "refusals": name in WITH_PROMPT, "seed": 3}
        expected = list(tokenize(rows, **kwargs))
        dataset = Dataset.from_list(rows)
        assert list(tokenize(dataset, **kwargs)) == expected
        assert list(tokenize(dataset.with_format("torch"), **kwargs)) == expected
        stream = tokenize(dataset.to_iterable_dataset(num_shards=1), **kwargs)
        assert isinstance(stream, IterableDataset) and list(stream) == expected == list(stream)

    every(ROWS.keys(), check)


def test_two_processes_give_the_same():
    rows = [{"question": f"Who was number {i}?", "answer": f"Number {i}."} for i in range(11)]
    kwargs = {"refusals": True, "seed": 5}
    one, two = tokenize(rows, **kwargs), tokenize(rows, num_proc=2, **kwargs)
    assert one.column_names == two.column_names and list(one) == list(two)


def test_a_bad_row_in_another_process_keeps_its_message():
    rows = Dataset.from_dict({"text": ["a"] * 9 + [None]})
    with pytest.raises(TypeError, match="`text` in row 9"):
        tokenize(rows, num_proc=2)


def test_a_generator_without_schema_is_a_stream_too():
    def generate():
        yield from ({"question": f"Who {i}?", "answer": "Me", "id": i} for i in range(4))

    stream = tokenize(IterableDataset.from_generator(generate))
    assert [sorted(example) for example in stream] == [["input_ids", "labels"]] * 4


def test_first_example_of_a_stream_is_checked_at_once_and_the_others_as_they_come():
    def stream(lengths):
        rows = [{"prompt": "x" * n, "completion": " y"} for n in lengths]
        return Dataset.from_list(rows).to_iterable_dataset()

    with pytest.raises(ValueError, match="Row 0 of the `forget` dataset is empty, or has no answer token"):
        tokenize(stream([50, 1]), max_length=12)
    late = iter(tokenize(stream([1, 50]), max_length=12))
    with pytest.raises(ValueError, match="Row 1 of the `forget` dataset is empty, or has no answer token"):
        list(late)
    bad = Dataset.from_list([{"text": None}]).to_iterable_dataset()
    with pytest.raises(TypeError, match="`text` in row 0"):
        tokenize(bad)


def test_a_stream_drops_with_a_warning(caplog):
    rows = [{"prompt": "x" * n, "completion": " y"} for n in (50, 1, 50, 2)]
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        stream = tokenize(
            Dataset.from_list(rows).to_iterable_dataset(), tiny_tokenizer(), max_length=12, drop_empty=True
        )
        assert list(stream) == list(tokenize([rows[1], rows[3]], tiny_tokenizer()))
    assert "Row 0" in caplog.text and "Row 2" in caplog.text and "Row 1" not in caplog.text


# Refusals


def test_refusal_follows_the_same_prompt():
    def check(name):
        tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
        example = tokenize([ROWS[name]], tokenizer, refusals=True)[0]
        refusal = targets(tokenizer, example["refusal_labels"])
        assert refusal.removesuffix("</s>").strip() in REFUSALS
        assert refusal.startswith(" ") is (name == "prompt-completion")  # as the answer does
        n_prompt = example["labels"].count(-100)
        assert example["refusal_labels"].count(-100) == n_prompt
        assert example["refusal_input_ids"][:n_prompt] == example["input_ids"][:n_prompt]
        without = tokenize([ROWS[name]], tokenizer)[0]
        assert without == {column: example[column] for column in ("input_ids", "labels")}

    every(WITH_PROMPT, check)


def test_column_refusal_is_used():
    def check(name):
        tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
        example = tokenize([{**ROWS[name], "refusal": "Never."}], tokenizer, refusals=True)[0]
        assert targets(tokenizer, example["refusal_labels"]).strip() == "Never.</s>"
        with pytest.raises(TypeError, match="`refusal` in row 0 of the `forget` dataset is a int"):
            tokenize([{**ROWS[name], "refusal": 3}], tokenizer, refusals=True)

    every(WITH_PROMPT, check)


def test_refusal_has_the_leading_space_of_the_answer():
    def check(completion, refusal, expected):
        tokenizer = tiny_tokenizer()
        row = {"prompt": "Who?", "completion": completion, "refusal": refusal}
        assert targets(tokenizer, tokenize([row], tokenizer, refusals=True)[0]["refusal_labels"]) == expected + "</s>"

    every([(" a", "  No.", " No."), ("a", " No.", "No."), ("\na", "No.", "\nNo.")], check)


def test_refusals_come_from_seed_and_row_alone():
    rows = [{"question": f"Who {i}?", "answer": "Me"} for i in range(40)]
    tokenizer = tiny_tokenizer()

    def drawn(seed, rows=rows):
        result = tokenize(rows, tokenizer, refusals=True, seed=seed)
        return [targets(tokenizer, labels)[1:].removesuffix("</s>") for labels in result["refusal_labels"]]

    assert drawn(0) == [random.Random(f"0-{i}").choice(REFUSALS) for i in range(40)]
    assert drawn(0) == drawn(0) and drawn(0) != drawn(1)
    assert drawn(0, rows[:7]) == drawn(0)[:7]
    assert len(set(drawn(0))) > 15


def test_refusals_need_a_prompt():
    for name in ("text", "input_ids"):
        with pytest.raises(ValueError, match=f"needs a prompt to refuse.*`{name}` format"):
            tokenize([ROWS[name]], refusals=True)


def test_the_list_of_refusals_is_varied():
    assert len(REFUSALS) == len(set(REFUSALS)) == 50
    assert all(sentence == sentence.strip() and sentence.endswith(".") for sentence in REFUSALS)
    assert len({sentence.split()[0] for sentence in REFUSALS}) >= 20


# Errors

TABLE = {
    "a DatasetDict": (
        DatasetDict(test=Dataset.from_list([{"text": "a"}])),
        TypeError,
        r"DatasetDict.*\['test'\].*pick",
    ),
    "None": (None, TypeError, "is a NoneType: pass a `datasets.Dataset`"),
    "a string": ("locuslab/TOFU", TypeError, "string 'locuslab/TOFU': load it first"),
    "a tuple": (({"text": "a"},), TypeError, "is a tuple"),
    "a list of strings": ([{"text": "a"}, "b"], TypeError, "Row 1 .*is a str: each row must be a dict"),
    "an empty list": ([], ValueError, "is empty"),
    "an empty dataset": (Dataset.from_dict({"text": []}), ValueError, "is empty"),
    "an empty stream": (IterableDataset.from_generator(lambda: iter(())), ValueError, "is empty"),
    "unknown columns": ([{"a": "", "prompt": ""}], ValueError, r"columns \['a', 'prompt'\], but needs `text`.*rename"),
    "an integer": ([{"text": "a"}, {"text": 5}], TypeError, "`text` in row 1 of the `retain` dataset is a int"),
    "a column of integers": (Dataset.from_dict({"text": [1]}), TypeError, "`text` in row 0 .* is a int"),
    "a missing value": (
        [{"question": "a", "answer": "b"}, {"question": "a"}],
        TypeError,
        "`answer` in row 1 .*NoneType",
    ),
    "half conversational": ([{"prompt": MESSAGES[:1], "completion": "a"}], TypeError, "`completion` .*is a str"),
    "no messages": ([{"messages": []}], TypeError, "`messages` in row 0 .*empty list"),
    "user last": ([{"messages": MESSAGES[:1]}], ValueError, "`messages` in row 0 .*'user'.*must be 'assistant'"),
    "user completes": ([{"prompt": MESSAGES, "completion": MESSAGES[:1]}], ValueError, "`completion` .*'user'"),
    "answer only": ([{"messages": MESSAGES[1:]}], ValueError, "prompt in row 0 .*ends with no message"),
    "after system": (
        [{"messages": [{"role": "system", "content": "a"}, MESSAGES[1]]}],
        ValueError,
        "prompt in row 0 .*role 'system'",
    ),
    "no content": (
        [{"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}],
        TypeError,
        "answer in `messages` in row 0 .*NoneType",
    ),
    "text as input_ids": ([{"input_ids": "abc"}], TypeError, "`input_ids` in row 0 .*is a str.*list of integers"),
    "floats as labels": ([{"input_ids": [1], "labels": [1.0]}], TypeError, "`labels` in row 0 .*list of float"),
    "lengths": (
        [{"input_ids": [1, 2], "labels": [1]}],
        ValueError,
        "`labels` has 1 entries and `input_ids` 2 in row 0",
    ),
    "refusal lengths": (
        [{"input_ids": [1, 2], "refusal_input_ids": [1, 2, 3], "refusal_labels": [1, 2]}],
        ValueError,
        "`refusal_labels` has 2 entries and `refusal_input_ids` 3",
    ),
}


def test_errors_are_one_line_and_name_the_role():
    def check(dataset, kind, match):
        with pytest.raises(kind, match=match) as error:
            tokenize(dataset, role="retain")
        assert "\n" not in str(error.value) and "`retain`" in str(error.value)

    every(TABLE, check)


def test_without_a_tokenizer_only_tokens_are_accepted():
    kwargs = {"role": "retain", "max_length": None}
    assert tokenize_dataset([ROWS["input_ids"]], None, **kwargs)[0] == ROWS["input_ids"]
    for name in ("text", "messages"):
        with pytest.raises(ValueError, match="there is no tokenizer"):
            tokenize_dataset([ROWS[name]], None, **kwargs)


def test_messages_need_a_chat_template():
    for name in ("messages", "conversational prompt-completion"):
        with pytest.raises(ValueError, match=r"no chat template: set `tokenizer.chat_template`"):
            tokenize([ROWS[name]], tiny_tokenizer())


def test_qa_template_needs_a_place_for_the_question():
    with pytest.raises(ValueError, match=r"must contain '\{question\}'"):
        tokenize([ROWS["question-answer"]], tiny_tokenizer(), qa_template="Answer:")


def test_token_ids_outside_of_the_vocabulary():
    def check(row):
        with pytest.raises(ValueError, match=r"Token id (5|-100) in `(input_ids|labels)` of row 1.*vocabulary of 5"):
            tokenize([{"input_ids": [1, 4], "labels": [-100, 4]}, {"labels": row["input_ids"], **row}], vocab_size=5)
        with pytest.raises(ValueError, match="vocabulary of 20"):
            tokenize([ROWS["text"]], vocab_size=20)
        assert len(tokenize([ROWS["text"]], vocab_size=300)) == 1

    every([{"input_ids": [1, 5]}, {"input_ids": [1, 2], "labels": [1, 5]}, {"input_ids": [-100, 2]}], check)


# MUSE's chunks


def literal_muse(tokens, bos, max_length):
    """The benchmark's `.txt` route, line by line."""
    chunks, i = [], 0
    while i < len(tokens):
        chunks.append([bos, *tokens[i : i + max_length - 1]])
        i += max_length - 1
    if len(chunks[-1]) < max_length:
        chunks[-1] = (chunks[-1] + chunks[0])[:max_length]
    return chunks


def test_chunk_documents_is_muses_own_way():
    def check(max_length):
        tokenizer = tiny_tokenizer()
        texts = [TEXT, "Sorry, nothing.", TEXT[:30]]
        tokens = [token for text in texts for token in ids(tokenizer, text)]
        chunks = chunk_documents(texts, tokenizer, max_length)
        assert [chunk["input_ids"] for chunk in chunks] == literal_muse(tokens, BOS, max_length)
        assert all(chunk["labels"] == chunk["input_ids"] for chunk in chunks)
        assert len(chunks) == 1 or all(len(chunk["input_ids"]) == max_length for chunk in chunks)
        assert len(tokenize(chunks, tokenizer)) == len(chunks)

    every([2, 3, 5, 16, 41, 64, 500], check)


def test_chunk_documents_without_bos():
    tokenizer = tiny_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    tokens = ids(tokenizer, TEXT)
    chunks = [chunk["input_ids"] for chunk in chunk_documents([TEXT], tokenizer, 7)]
    rest = len(tokens) % 7
    assert rest, "the fixture has to leave a short last piece"
    assert chunks[0] == tokens[:7] and chunks[-1] == tokens[-rest:] + tokens[: 7 - rest]


def test_chunk_documents_refuses_what_is_no_list_of_texts():
    tokenizer = tiny_tokenizer()
    for texts in ("abc", [1], ["a", None]):
        with pytest.raises(TypeError, match="list of strings"):
            chunk_documents(texts, tokenizer, 8)
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="hold no token"):
            chunk_documents(texts, tokenizer, 8)
    with pytest.raises(ValueError, match="at least 2"):
        chunk_documents(["a"], tokenizer, 1)


# Levels


def test_every_example_of_a_row_has_its_level():
    def check(name, stream):
        rows = Dataset.from_list([{**ROWS[name], "forget_level": level} for level in (2.5, 7.0)])
        rows = rows.to_iterable_dataset() if stream else rows
        longest = 32 if name == "text" else None
        made = list(tokenize(rows, max_length=longest, levels=True))
        levels = [example["forget_level"] for example in made]
        count = len(made) // 2
        assert levels == [2.5] * count + [7.0] * count
        assert count > 1 or name != "text"
        assert all("forget_level" not in example for example in tokenize(rows))

    every(product(ROWS, [False, True]), check)


def test_alternatives_of_a_row_share_its_level():
    row = {**ROWS["question-answer"], "alternative": ["Ada Bloom.", "Nobody."], "forget_level": 3.5}
    assert list(tokenize([row], alternatives=True, levels=True)["forget_level"]) == [3.5, 3.5]


@pytest.mark.parametrize(
    ("level", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (None, TypeError)],
)
def test_a_level_that_cannot_be_is_named_with_its_row(level, error):
    rows = [{**ROWS["text"], "forget_level": each} for each in (2.5, level)]
    with pytest.raises(error, match=r"`forget_level` in row 1 of the `forget` dataset .*nats per answer token"):
        tokenize(rows, levels=True)
    tokenize(rows)  # it is not read


def test_levels_that_are_texts_or_missing():
    with pytest.raises(TypeError, match=r"`forget_level` in row 0 .* is a str"):
        tokenize([{**ROWS["text"], "forget_level": "4.5"}], levels=True)
    with pytest.raises(ValueError, match="no column `forget_level`"):
        tokenize([ROWS["text"]], levels=True)
