"""Which columns are read: one format per dataset, anything else refused by name or left unread."""

import re

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, Image
from support.cases import every
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.data.columns import FORMATS, find_format
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.reading import read_rows

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
IDS, PAD = [5, 9, 20, 33], 2


def tokenize(rows, tokenizer=None, **kwargs):
    return tokenize_dataset(rows, tokenizer or tiny_tokenizer(), **{"role": "forget", "max_length": 64, **kwargs})


# one format


def test_each_format_alone_is_found():
    for name, columns in FORMATS.items():
        assert find_format([*columns, "id", "label", "paraphrased_answer"], "forget") == name


AMBIGUOUS = [
    (["text", "labels"], ["labels"]),
    (["text", "answer"], ["answer"]),
    (["text", "completion"], ["completion"]),
    (["prompt", "text"], ["prompt"]),
    (["instruction", "output", "text"], ["instruction", "output"]),
    (["text", "response"], ["response"]),
    (["text", "summary"], ["summary"]),
    (["question", "answer", "choices"], ["choices"]),
    (["messages", "text"], ["text"]),
    (["messages", "prompt", "completion"], ["prompt", "completion"]),
    (["prompt", "completion", "question", "answer"], ["question", "answer"]),
    (["question", "answer", "context"], ["context"]),
    (["question", "answer", "labels"], ["labels"]),
    (["input_ids", "question", "answer"], ["question", "answer"]),
    (["input_ids", "seq_lengths"], ["seq_lengths"]),
]


def test_two_readings_of_one_dataset_are_refused_by_name():
    def check(columns, rivals):
        with pytest.raises(ValueError, match="`forget`") as raised:
            find_format(columns, "forget")
        said = str(raised.value)
        assert "\n" not in said and all(f"`{rival}`" in said for rival in rivals)
        assert "select_columns" in said or "seq_lengths" in said

    every(AMBIGUOUS, check)


def test_tokens_with_their_targets_leave_no_question():
    for columns in (["input_ids", "labels", "text", "answer"], ["input_ids", "completion_mask", "prompt"]):
        assert find_format(columns, "forget") == "input_ids"
    assert find_format(["input_ids", "attention_mask", "text"], "forget") == "input_ids"


def test_the_remedy_for_other_names_reads_them():
    rows = [{"instruction": "Who?", "input": "", "output": "Me."}]
    with pytest.raises(ValueError, match=r"dataset has the columns .*'output'.*rename them") as raised:
        find_format(rows[0], "retain")
    call = re.search(r"blur_trainer.(read_rows.*?dataset)`", str(raised.value)).group(1)
    names = {"read_rows": read_rows, "dataset": rows, "tokenizer": tiny_tokenizer()}
    assert eval(call, names)[0] == {"question": "Who?", "answer": "Me."}  # noqa: S307  the call is in our own message


# what is not read may be anything


def test_columns_that_are_not_needed_are_not_touched():
    qa = {"question": ["Who?"] * 2, "answer": ["Me."] * 2}
    plain = list(tokenize(Dataset.from_dict(qa)))
    image = Dataset.from_dict({**qa, "image": ["/nowhere/1.png"] * 2}).cast_column("image", Image())
    sound = Dataset.from_dict({**qa, "sound": [{"bytes": b"x", "path": None}] * 2}).cast_column("sound", Audio())
    for dataset in (image, sound, image.to_iterable_dataset()):
        assert list(tokenize(dataset)) == plain
    rows = [{"text": "a b", "meta": 1}, {"text": "c", "meta": "x", "more": object()}]
    assert list(tokenize(rows)) == list(tokenize([{"text": "a b"}, {"text": "c"}]))


# rows as the dataset gives them


def test_a_transform_is_read_through():
    plain = Dataset.from_dict({"text": ["Iva was here.", "So was Iva."], "id": [1, 2]})
    hidden = plain.with_transform(lambda batch: {"text": [text.replace("Iva", "NAME") for text in batch["text"]]})
    assert list(tokenize(hidden)) == list(tokenize([{"text": "NAME was here."}, {"text": "So was NAME."}]))
    tokens = plain.with_transform(lambda batch: {"input_ids": [IDS] * len(batch["text"])})
    assert list(tokenize(tokens)["input_ids"]) == [IDS, IDS]
    with pytest.raises(TypeError, match="`text` in row 1 of the `forget` dataset is a NoneType"):
        tokenize(plain.with_transform(lambda batch: {"text": [None if "So" in t else t for t in batch["text"]]}))


def test_columns_that_a_format_hides_stay_hidden():
    dataset = Dataset.from_dict({"text": ["Iva was here."], "labels": ["no"], "answer": ["no"]})
    dataset.set_format(columns=["text"])
    assert list(tokenize(dataset)) == list(tokenize([{"text": "Iva was here."}]))


def test_arrays_tensors_and_numpys_numbers_are_tokens():
    expected = tokenize([{"input_ids": IDS, "labels": [-100, *IDS[1:]], "ref_logps": -1.5}])[0]
    labels = [-100, *IDS[1:]]
    for make in (np.array, torch.tensor, lambda ids: [np.int64(token) for token in ids]):
        row = {"input_ids": make(IDS), "labels": make(labels), "ref_logps": np.float32(-1.5)}
        assert tokenize([row])[0] == expected
    with pytest.raises(TypeError, match=r"`input_ids` in row 0 .*list of list"):
        tokenize([{"input_ids": np.array([IDS])}])
    with pytest.raises(TypeError, match=r"`input_ids` in row 0 .*list of float"):
        tokenize([{"input_ids": np.array([1.0, 2.0])}])


# masks


def test_masked_padding_is_dropped_on_either_side():
    alone = tokenize([{"input_ids": IDS}])[0]
    right = {"input_ids": [*IDS, PAD, PAD], "attention_mask": [1, 1, 1, 1, 0, 0]}
    left = {"input_ids": [PAD, PAD, *IDS], "attention_mask": [0, 0, 1, 1, 1, 1]}
    given = {**left, "labels": [-100, -100, -100, *IDS[1:]]}
    for row in (right, left):
        assert tokenize([row])[0] == alone
    assert tokenize([given])[0] == {"input_ids": IDS, "labels": [-100, *IDS[1:]]}
    tokenizer = tiny_tokenizer(pad="</s>")
    padded = Dataset.from_dict(dict(tokenizer(["Mara Velin.", "Sorry"], padding="max_length", max_length=24)))
    batch = UnlearningCollator(tokenizer.pad_token_id)(list(tokenize(padded, tokenizer)))
    assert batch["attention_mask"].sum() == np.sum(padded["attention_mask"])
    assert not (batch["labels"] == tokenizer.pad_token_id).any()


BAD_MASKS = [
    ({"attention_mask": [1, 0, 1, 1]}, "row 0 of the `forget` dataset is 0 at position 1"),
    ({"attention_mask": [0, 0, 0, 0]}, "row 0 of the `forget` dataset is 0 everywhere"),
    ({"attention_mask": [1, 1, 1]}, "`attention_mask` has 3 entries and `input_ids` 4 in row 0"),
    ({"attention_mask": [1, 2, 1, 1]}, "`attention_mask` in row 0 .*a mask is 0 or 1"),
    ({"completion_mask": [0, 0, 0, 0]}, "no answer token left"),
]


def test_masks_that_say_nothing():
    def check(mask, match):
        with pytest.raises(ValueError, match=match):
            tokenize([{"input_ids": IDS, **mask}])

    every(BAD_MASKS, check)


def test_masks_of_targets_make_labels():
    def check(masks, labels):
        assert tokenize([{"input_ids": IDS, **masks}])[0]["labels"] == labels

    cases = [
        ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 20, 33]),
        ({"assistant_masks": [0, 1, 1, 0]}, [-100, 9, 20, -100]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}, [-100, -100, 20, -100]),
        ({"completion_mask": [0, 0, 1, 1], "labels": IDS}, IDS),
    ]
    every(cases, check)


# empty rows and text that is none

EMPTY = [
    {"text": ""},
    {"text": " \n"},
    {"question": "Who?", "answer": "  "},
    {"prompt": "Who?", "completion": ""},
    {"messages": [USER, {"role": "assistant", "content": " "}]},
]


def test_rows_without_text_or_answer_are_named_or_dropped(caplog):
    full = {"text": "a", "answer": "b", "completion": "c"}
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)

    def check(row):
        good = {column: full.get(column, value) for column, value in row.items()}
        if "messages" in row:
            good = {"messages": [USER, ANSWER]}
        with pytest.raises(ValueError, match=r"1 of the 3 examples .*\(rows 1\) are empty"):
            tokenize([good, row, good], tokenizer)
        assert len(tokenize([good, row, good], tokenizer, drop_empty=True)) == 2
        assert "1 of the 3" in caplog.text
        with pytest.raises(ValueError, match="Row 0 of the `forget` dataset is empty"):
            tokenize(Dataset.from_list([row]).to_iterable_dataset(), tokenizer)
        caplog.clear()

    every(EMPTY, check)
    with pytest.raises(ValueError, match="`refusal` in row 0"):
        tokenize([{"question": "Who?", "answer": "Me", "refusal": " "}], refusals=True)


SURROGATE = "half \ud800 of a pair"


def test_half_a_surrogate_pair_is_named():
    for row in ({"text": SURROGATE}, {"question": "Who?", "answer": SURROGATE}):
        with pytest.raises(
            ValueError, match=re.escape(f"`{list(row)[-1]}` in row 1 of the `forget` dataset is no Uni")
        ):
            tokenize([dict.fromkeys(row, "fine"), row])


def test_strings_and_messages_do_not_mix():
    rows = [{"prompt": "Who?", "completion": " Me."}, {"prompt": [USER], "completion": [ANSWER]}]
    with pytest.raises(TypeError, match="`prompt` is a str in row 0 and a list in row 1"):
        tokenize(rows, tiny_tokenizer(chat_template=CHAT_TEMPLATE))


def test_rows_that_fit_into_no_table_name_their_set():
    calls = [{"function": {"arguments": value}} for value in ({"a": 1}, {"a": "x"})]
    chats = [[USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER, ANSWER] for call in calls]
    for rows in ([{"messages": chat} for chat in chats], [{"input_ids": [1, 2**70]}]):
        with pytest.raises(ValueError, match=r"rows of the `forget` list do not fit into one table"):
            tokenize(rows, tiny_tokenizer(chat_template=CHAT_TEMPLATE))
