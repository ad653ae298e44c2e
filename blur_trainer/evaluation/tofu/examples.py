"""Turns TOFU's splits into tokenized questions with all their answers, with the same tokens as in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.data.encoding import RowEncoder, leading_special_ids
from blur_trainer.data.tofu_templates import TOFUTemplate

SPLITS = {
    "forget": "forget_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "holdout": "holdout",
}
CHOICES = ("real_authors", "world_facts")  # probability among the choices; the answer itself replaces the paraphrase


@dataclass(frozen=True)
class Questions:
    """
    One split, prepared for scoring and generation.

    Args:
        prompts: texts that the model continues.
        answers: true answers.
        variants: per question, tokenized: the answer, the paraphrased answer if there is one, the perturbed answers.
        paraphrased: whether there are paraphrased answers.
        perturbed: whether there are perturbed answers.
    """

    prompts: list[str]
    answers: list[str]
    variants: list[list[dict[str, Any]]]
    paraphrased: bool
    perturbed: bool


def read_splits(
    data: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    template: TOFUTemplate,
    *,
    max_rows: int | None,
    max_length: int,
) -> dict[str, Questions]:
    """The splits of `data` by group. Raises if a split exists but cannot be used."""
    encoder = RowEncoder(
        tokenizer=tokenizer,
        fmt="prompt-completion",
        role="",
        prefix=leading_special_ids(tokenizer),
        max_length=max_length,
        refusals=False,
        seed=0,
        qa_template="",
        vocab_size=None,
    )
    found = {
        group: _questions(name, data[name], encoder, template, max_rows)
        for group, name in SPLITS.items()
        if name in data
    }
    if not found:
        raise ValueError(f"`data` has none of TOFU's splits {list(SPLITS.values())}, it has {sorted(data)}.")
    return found


def _questions(
    name: str, split: Dataset, encoder: RowEncoder, template: TOFUTemplate, max_rows: int | None
) -> Questions:
    missing = [column for column in ("question", "answer") if column not in split.column_names]
    if missing:
        raise ValueError(f"Split `{name}` lacks the columns {missing}, it has {split.column_names}.")
    if len(split) == 0:
        raise ValueError(f"Split `{name}` is empty: its metrics would be undefined. Fill it or leave it out.")
    holdout = name == SPLITS["holdout"]  # only the answer is scored, even if it has other columns
    paraphrased = not holdout and "paraphrased_answer" in split.column_names
    perturbed = not holdout and "perturbed_answer" in split.column_names
    prompts, answers, variants = [], [], []
    for index in range(min(len(split), max_rows or len(split))):
        row = split[index]
        texts = [row["answer"]]
        texts += [row["paraphrased_answer"]] if paraphrased else []
        texts += _wrong_answers(name, index, row) if perturbed else []
        pairs = [_checked(name, index, template, row["question"], text) for text in texts]
        prompts.append(pairs[0][0])
        answers.append(row["answer"])
        variants.append([_encode(name, index, encoder, prompt, completion) for prompt, completion in pairs])
    return Questions(prompts, answers, variants, paraphrased, perturbed)


def _wrong_answers(name: str, index: int, row: Mapping[str, Any]) -> list[str]:
    wrong = row["perturbed_answer"]
    if not isinstance(wrong, list) or not wrong:
        raise ValueError(
            f"`perturbed_answer` in row {index} of the split `{name}` must be a list of at least one wrong answer, got "
            f"{wrong!r}."
        )
    return wrong


def _checked(name: str, index: int, template: TOFUTemplate, question: Any, answer: Any) -> tuple[str, str]:
    for what, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            raise TypeError(
                f"Row {index} of the split `{name}` has an {what} of type {type(value).__name__}: give strings, one "
                "paraphrased answer per question."
            )
    return template.prompt(question), template.completion(answer)


def _encode(name: str, index: int, encoder: RowEncoder, prompt: str, completion: str) -> dict[str, Any]:
    (example,) = encoder.encode({"prompt": prompt, "completion": completion}, index)
    if example["empty"]:
        raise ValueError(
            f"Row {index} of the split `{name}` has no answer token left within max_length={encoder.max_length}: raise "
            "`max_length`, or shorten the question."
        )
    return {"input_ids": example["input_ids"], "labels": example["labels"]}
