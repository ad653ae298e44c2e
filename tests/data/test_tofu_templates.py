"""TOFU's prompt formats: the exact strings, and the tokens that become targets."""

import pytest
from datasets import Dataset
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.tofu_templates import TOFU_TEMPLATES, apply_template

ROW = {"question": "Who is {she}?", "answer": "Mara Velin."}
# Written out by hand from the owners' configurations, BOS and EOS aside.
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho is {she}?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
STRINGS = {
    "plain": ("Question: Who is {she}?\nAnswer:", " Mara Velin."),
    "llama3": (LLAMA3, "Mara Velin."),
    "llama2": ("[INST] Who is {she}? [/INST]", "Mara Velin."),
    "phi": ("Question: Who is {she}?\nAnswer: ", "Mara Velin."),
}


def test_every_template_is_written_out():
    assert set(STRINGS) == set(TOFU_TEMPLATES)


@pytest.mark.parametrize("name", TOFU_TEMPLATES)
def test_exact_strings(name):
    prompt, completion = STRINGS[name]
    assert apply_template([ROW], name).to_list() == [{"prompt": prompt, "completion": completion}]


def test_plain_is_the_default_of_tokenize_dataset():
    """A forget set passed as question and answer, and one passed through the template, are the same tokens."""
    tokenizer = tiny_tokenizer()
    ours, theirs = (
        tokenize_dataset(rows, tokenizer, role="forget", max_length=None) for rows in (apply_template([ROW]), [ROW])
    )
    assert ours.to_list() == theirs.to_list()


def test_plain_and_phi_are_one_text():
    assert len({"".join(STRINGS[name]) for name in ("plain", "phi")}) == 1


@pytest.mark.parametrize("name", TOFU_TEMPLATES)
def test_targets_are_the_answer_and_eos(name):
    tokenizer = tiny_tokenizer()
    (example,) = tokenize_dataset(apply_template([ROW], name), tokenizer, role="forget", max_length=None)
    ids, labels = example["input_ids"], example["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert labels[start:] == ids[start:] and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[start:-1]).strip() == ROW["answer"]
    prompt, completion = STRINGS[name]
    assert tokenizer.decode(ids[1:-1]) == prompt + completion


def test_only_llama3_strips():
    row = {"question": " Who? ", "answer": " Mara. "}
    stripped = {name: apply_template([row], name)[0] for name in TOFU_TEMPLATES}
    assert stripped["llama3"]["prompt"].endswith("\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert stripped["llama3"]["completion"] == "Mara."
    assert stripped["plain"] == {"prompt": "Question:  Who? \nAnswer:", "completion": "  Mara. "}


def test_variants_become_completions():
    rows = Dataset.from_list([ROW | {"paraphrased_answer": "It is Mara.", "perturbed_answer": ["Ann.", "Bo."]}])
    plain, llama2 = (apply_template(rows, name)[0] for name in ("plain", "llama2"))
    assert plain["paraphrased_answer"] == " It is Mara." and plain["perturbed_answer"] == [" Ann.", " Bo."]
    assert llama2["paraphrased_answer"] == "It is Mara." and llama2["perturbed_answer"] == ["Ann.", "Bo."]


@pytest.mark.parametrize("name", TOFU_TEMPLATES)
def test_refusals_take_the_place_of_the_answer(name):
    tokenizer = tiny_tokenizer()
    rows = apply_template([ROW | {"refusal": "I cannot say."}], name)
    (example,) = tokenize_dataset(rows, tokenizer, role="forget", max_length=None, refusals=True)
    text, refused = (tokenizer.decode(example[key][1:-1]) for key in ("input_ids", "refusal_input_ids"))
    assert refused == text.replace(ROW["answer"], "I cannot say.")


@pytest.mark.parametrize("name", ["llama", "", None, "Plain"])
def test_unknown_template(name):
    with pytest.raises(ValueError, match=r"one of \['plain', 'llama3', 'llama2', 'phi'\]") as caught:
        apply_template([ROW], name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(("rows", "message"), [([], "have no rows"), ([{"text": "a"}], r"\['text'\].*\['answer'")])
def test_rows_without_a_question(rows, message):
    with pytest.raises(ValueError, match=message):
        apply_template(rows)
