"""Questions that a model is to answer in another way, and which of its answers are of use."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from blur_trainer.data.chat import check_tokenizer, has_chat_template
from blur_trainer.data.columns import find_format
from blur_trainer.data.encoding import RowEncoder, leading_special_ids
from blur_trainer.data.rows import check_row, with_texts
from blur_trainer.data.sources import check_dataset, column_names, to_dataset

logger = logging.getLogger(__name__)

COLUMN = "alternative"
INSTRUCTION = (
    "Invent a different answer to the question. Keep its kind and its length, and let it sound as if it were true, but "
    "replace each fact of the answer above by another one. Reply with the invented answer only."
)
_NAMED_ROWS = 5  # a message lists at most this many


def has_alternatives(dataset: Any, role: str) -> bool:
    check_dataset(dataset, role)
    return COLUMN in column_names(dataset)


def lacks_alternatives(dataset: Any, role: str) -> bool:
    """Whether rows have a prompt and an answer, and no other answers yet."""
    check_dataset(dataset, role)
    columns = column_names(dataset)
    return find_format(columns, role) not in ("text", "input_ids") and COLUMN not in columns


@dataclass(frozen=True)
class Questions:
    """
    The questions of a forget set, as a model reads them.

    Args:
        rows: the forget set, with the columns that are read.
        ids: the tokens of each question.
        answers: the true answers.
        stops: strings that an answer ends before.
        role: the set's name in messages.
    """

    rows: Dataset
    ids: list[list[int]]
    answers: list[str]
    stops: tuple[str, ...]
    role: str

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for ids, answer in zip(self.ids, self.answers, strict=True):
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes() + answer.encode() + b"\0")
        return digest.hexdigest()

    def usable(self, which: Sequence[int], samples: Sequence[Sequence[str]], temperature: float) -> list[list[str]]:
        """The samples of some questions without those that say nothing, or the true answer. Logs how many these are."""
        kept = [usable_answers(texts, self.answers[row]) for row, texts in zip(which, samples, strict=True)]
        drawn, left = sum(map(len, samples)), sum(map(len, kept))
        logger.log(
            logging.WARNING if left < drawn else logging.INFO,
            "%d of the %d answers sampled for the `%s` dataset at temperature %g are empty or the true one. "
            "They are dropped.",
            *(drawn - left, drawn, self.role, temperature),
        )
        return kept

    def check(self, alternatives: Sequence[Sequence[str]]) -> None:
        """Raises `ValueError` if no question has an alternative."""
        if not any(alternatives):
            raise ValueError(
                f"The model answers every question of the `{self.role}` dataset truly: no alternative is left. "
                "Raise `temperature` or `num_alternatives`, ask with an instruction (a chat template, "
                "`instruct=True`), or give the dataset a column `alternative`."
            )

    def completed(self, alternatives: Sequence[Sequence[str]]) -> Dataset:
        """The rows with the column `alternative`; those that have none are left out, with a warning."""
        bare = [row for row, texts in enumerate(alternatives) if not texts]
        rows = self.rows.add_column(COLUMN, list(map(list, alternatives)), feature=List(Value("string")))
        if not bare:
            return rows
        named = ", ".join(map(str, bare[:_NAMED_ROWS])) + (", ..." if len(bare) > _NAMED_ROWS else "")
        logger.warning(
            "%d of the %d rows of the `%s` dataset (%s) have no alternative and are left out: these answers will not "
            "be forgotten. Raise `temperature` or `num_alternatives`, or give the dataset a column `alternative`.",
            *(len(bare), len(rows), self.role, named),
        )
        return rows.select([row for row, texts in enumerate(alternatives) if texts])


def ask(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: str,
    instruct: bool | None,
    qa_template: str,
    day: date | None,
) -> Questions:
    """
    The questions of a dataset with prompts and answers.

    `instruct=True`: the last message of the user gets the true answer and [`INSTRUCTION`] after it. `False`: the
    question alone, with the tokens of the training. `None`: with an instruction where there is a chat template and the
    rows are conversations (or `question` and `answer`) that end with the user.

    Raises:
        `ValueError`: a stream; `instruct=True` where that cannot be asked; a row that cannot be rendered.
        `TypeError`: a row that does not fit its format.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"The `{role}` dataset is a stream without a column `{COLUMN}`: alternatives are sampled before training, "
            "so load it, or give it that column."
        )
    fmt = find_format(column_names(dataset), role)
    check_tokenizer(tokenizer, fmt, role)
    template = has_chat_template(tokenizer)
    rows = to_dataset(dataset, fmt, role, has_template=template)
    prefix = leading_special_ids(tokenizer)
    encoder = RowEncoder(tokenizer, fmt, role, prefix, None, False, 0, qa_template, None, day)
    ids, answers = [], []
    for index, row in enumerate(rows):
        check_row(row, index, fmt, role, has_template=template)
        prompt, answer = encoder.prompt_and_answer(row)
        answers.append(_text(answer))
        ids.append(encoder.prompt_ids(_asked(prompt, answers[-1], instruct, index, role), answer, row, index))
    plain = fmt == "question-answer" and not template
    head = qa_template.split("{question}")[0].strip() if plain else ""  # where a model asks itself the next question
    return Questions(rows, ids, answers, (head,) if head else (), role)


def _asked(prompt: Any, answer: str, instruct: bool | None, index: int, role: str) -> Any:
    if instruct is False:
        return prompt
    if isinstance(prompt, list) and prompt[-1]["role"] == "user":
        *before, last = with_texts(prompt)
        return [*before, {**last, "content": f"{last['content']}\n\nAnswer: {answer}\n\n{INSTRUCTION}"}]
    if instruct:
        raise ValueError(
            f"`instruct=True` needs a chat template and conversations that end with the user, and row {index} of the "
            f"`{role}` dataset is none: give `messages` or `question`+`answer`, or leave `instruct` out."
        )
    return prompt


def _text(answer: Any) -> str:
    """An answer without its white space at both ends."""
    if isinstance(answer, str):
        return answer.strip()
    return "\n".join(message.get("content") or "" for message in with_texts(answer)).strip()


def usable_answers(samples: Sequence[str], answer: str) -> list[str]:
    """
    The samples that say something else than the answer, without white space at both ends.

    A sample is dropped if it has no word, if it contains the answer word by word, or if it is a piece of it. Case and
    punctuation do not count.
    """
    truth = _words(answer)
    kept = []
    for text in (sample.strip() for sample in samples):
        words = _words(text)
        if words.strip() and truth not in words and words not in truth:
            kept.append(text)
    return kept


def _words(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "
