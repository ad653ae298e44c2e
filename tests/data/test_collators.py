"""Collators: shapes, padding, and masks that know a real EOS from padding."""

import copy

import pytest
import torch
from datasets import Dataset
from support.tiny_tokenizer import tiny_tokenizer
from torch.utils.data import DataLoader

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.pairing import PairedDataset

EOS = 1
KEYS = {"input_ids", "attention_mask", "labels"}


def example(n, start=10, **extra):
    ids = list(range(start, start + n))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], **extra}


def literal_pad(rows, value, multiple=1):
    length = -(-max(map(len, rows)) // multiple) * multiple
    return [row + [value] * (length - len(row)) for row in rows]


@pytest.mark.parametrize("multiple", [None, 1, 4, 8, 64])
@pytest.mark.parametrize("lengths", [[3], [2, 5], [5, 2, 9, 1], [8, 8]])
def test_against_a_literal_loop(lengths, multiple):
    rows = [example(n, start=10 * n) for n in lengths]
    batch = UnlearningCollator(7, pad_to_multiple_of=multiple)(rows)
    expected = {
        "input_ids": literal_pad([row["input_ids"] for row in rows], 7, multiple or 1),
        "labels": literal_pad([row["labels"] for row in rows], -100, multiple or 1),
        "attention_mask": literal_pad([[1] * n for n in lengths], 0, multiple or 1),
    }
    assert batch.keys() == KEYS
    for name, value in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == value


def test_paired_items_give_one_batch_per_role_each_with_its_own_length():
    items = [{"forget": example(3), "retain": example(6)}, {"forget": example(2), "retain": example(1)}]
    batch = UnlearningCollator(0)(items)
    assert list(batch) == ["forget", "retain"]
    assert batch["forget"]["input_ids"].shape == (2, 3) and batch["retain"]["input_ids"].shape == (2, 6)
    assert batch["forget"].keys() == batch["retain"].keys() == KEYS
    assert list(UnlearningCollator(0)([{"forget": example(3)}])) == ["forget"]


@pytest.mark.parametrize("wrap", [lambda row: row, lambda row: {"forget": row, "retain": example(2)}])
def test_refusals_and_reference_scores(wrap):
    rows = [
        example(3, refusal_input_ids=[1, 2], refusal_labels=[-100, 2], ref_logps=-1.25, refusal_ref_logps=-4.0),
        example(
            2, refusal_input_ids=[1, 2, 3, 4], refusal_labels=[-100, 2, 3, 4], ref_logps=-0.5, refusal_ref_logps=-8.0
        ),
    ]
    batch = UnlearningCollator(0)([wrap(row) for row in rows])
    batch = batch.get("forget", batch)
    assert batch.keys() == KEYS | {"ref_logps", "refusal"}
    assert batch["ref_logps"].dtype == torch.float32 and batch["ref_logps"].tolist() == [-1.25, -0.5]
    refusal = batch["refusal"]
    assert refusal.keys() == KEYS | {"ref_logps"}
    assert refusal["ref_logps"].tolist() == [-4.0, -8.0]
    assert refusal["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert refusal["labels"].tolist() == [[-100, 2, -100, -100], [-100, 2, 3, 4]]
    assert refusal["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_other_columns_are_left_out_and_the_items_untouched():
    rows = [example(2, id="a"), example(3, id="b")]
    before = copy.deepcopy(rows)
    assert UnlearningCollator(0)(rows).keys() == KEYS
    assert rows == before


def test_tensors_are_accepted():
    rows = Dataset.from_list([example(2), example(3)])
    plain, torched = UnlearningCollator(0)(list(rows)), UnlearningCollator(0)(list(rows.with_format("torch")))
    assert all(torch.equal(plain[name], torched[name]) for name in KEYS)


@pytest.mark.parametrize("pad", ["</s>", "<pad>"])
def test_a_real_eos_is_attended_and_trained_on_when_it_is_also_the_padding(pad):
    tokenizer = tiny_tokenizer(pad=pad)
    rows = [{"text": "one</s>two"}, {"text": "a much longer text than the first one</s>"}]
    data = tokenize_dataset(rows, tokenizer, role="forget", max_length=None)
    assert data[0]["input_ids"].count(EOS) == 2
    batch = UnlearningCollator(tokenizer.pad_token_id)(list(data))
    lengths = [len(row["input_ids"]) for row in data]
    assert batch["attention_mask"].sum(1).tolist() == lengths and lengths[0] < lengths[1]
    for row, length in enumerate(lengths):
        assert batch["labels"][row, :length].tolist() == batch["input_ids"][row, :length].tolist()
        assert batch["attention_mask"][row, :length].all()
        assert not batch["attention_mask"][row, length:].any()
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
    attended_eos = (batch["input_ids"] == EOS) & batch["attention_mask"].bool()
    assert attended_eos.sum(1).tolist() == [2, 1]


def test_from_rows_to_batches_in_workers():
    tokenizer = tiny_tokenizer(pad="</s>")
    rows = [{"question": f"Who {i}?", "answer": "Me " * i} for i in range(1, 6)]
    forget = tokenize_dataset(rows, tokenizer, role="forget", max_length=40, refusals=True)
    retain = tokenize_dataset([{"text": "The fire."}] * 2, tokenizer, role="retain", max_length=40)
    collator = UnlearningCollator(tokenizer.pad_token_id, 8)
    batches = list(DataLoader(PairedDataset(forget, retain), batch_size=2, collate_fn=collator, num_workers=1))
    assert [batch["forget"]["input_ids"].shape[0] for batch in batches] == [2, 2, 1]
    for batch in batches:
        assert batch["forget"].keys() == KEYS | {"refusal"} and batch["retain"].keys() == KEYS
        for part in (batch["forget"], batch["forget"]["refusal"], batch["retain"]):
            assert part["input_ids"].shape == part["labels"].shape == part["attention_mask"].shape
            assert part["input_ids"].shape[1] % 8 == 0
            target = part["labels"] != -100
            assert (part["attention_mask"][target] == 1).all()
            assert torch.equal(part["labels"][target], part["input_ids"][target])


# Errors


@pytest.mark.parametrize("pad", [None, -1, "</s>", 1.0])
def test_pad_token_id_must_be_an_id(pad):
    with pytest.raises(ValueError, match=r"`pad_token_id` is .*tokenizer\.pad_token = tokenizer\.eos_token"):
        UnlearningCollator(pad)


def test_multiple_must_be_positive():
    with pytest.raises(ValueError, match="`pad_to_multiple_of` is 0"):
        UnlearningCollator(0, pad_to_multiple_of=0)


@pytest.mark.parametrize(
    "items, match",
    [
        ([], "list of examples is empty"),
        ([{"text": "a"}], r"`input_ids` is missing from one of the batch's examples: it has \['text'\]"),
        ([{"forget": {"input_ids": [1]}}], "`labels` is missing from one of the batch's forget"),
        ([{"forget": example(2), "retain": example(2)}, {"forget": example(2)}], "`retain` is missing from one"),
        ([{"forget": example(2)}, {"forget": example(2), "retain": example(2)}], "`retain` is missing from one"),
        ([example(2, ref_logps=1.0), example(2)], "`ref_logps` is missing"),
        ([example(2), example(2, refusal_input_ids=[1], refusal_labels=[1])], "`refusal_input_ids` is missing"),
        ([example(2, refusal_input_ids=[1])], "`refusal_labels` is missing"),
        (
            [example(2), {"input_ids": [1, 2], "labels": [1]}],
            "Example 1 of the batch .* has 2 `input_ids` but 1 `labels`",
        ),
    ],
)
def test_half_a_batch_is_an_error(items, match):
    with pytest.raises(ValueError, match=match):
        UnlearningCollator(0)(items)


def test_levels_of_the_forget_rows_only():
    items = [{"forget": example(3, forget_level=level), "retain": example(2)} for level in (2.5, 7)]
    batch = UnlearningCollator(0)(items)
    assert batch["forget"]["forget_level"].dtype == torch.float32
    assert batch["forget"]["forget_level"].tolist() == [2.5, 7.0]
    assert "forget_level" not in batch["retain"]
    with pytest.raises(ValueError, match="`forget_level` is missing"):
        UnlearningCollator(0)([example(3), example(2, forget_level=1.0)])
