"""The rows of an audit: which are relearned and which are measured, what a model is asked, and what it says of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.chat import has_chat_template
from blur_trainer.data.encoding import leading_special_ids
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.subset import sample_rows
from blur_trainer.evaluation.forget_scores import Known, read_answer
from blur_trainer.evaluation.forget_sets import Asked, asked, closing_ids, new_tokens
from blur_trainer.evaluation.row_losses import encoded_rows, length_limit
from blur_trainer.evaluation.scoring import generate_ids
from blur_trainer.pipeline.measure import Sets

#: longest example where none is given
_LENGTH = 512


def parted(rows: Dataset, most: int, seed: int) -> tuple[Dataset, Dataset, int]:
    """
    The rows to relearn, the others that are measured, and how many others there are.

    A tenth is relearned, four rows at the least, and no more than half. At most `most` others are measured, at equal
    distances.
    """
    size = len(rows)
    if size < 4:
        raise ValueError(f"The set has {size} rows; an audit relearns some and measures others: it takes 4 or more.")
    few = min(max(4, size // 10), size // 2)
    drawn = set(sample_rows(list(range(size)), few, seed))
    others = [index for index in range(size) if index not in drawn]
    places = np.linspace(0, len(others) - 1, min(len(others), most)).round().astype(int)
    return rows.select(sorted(drawn)), rows.select([others[place] for place in places]), len(others)


@dataclass(frozen=True)
class Side:
    """A model with the rows that it relearns, those that it is measured on, and what it is asked of these."""

    name: str
    model: PreTrainedModel
    part: Dataset
    rest: Dataset
    asked: list[Asked]


class Reader:
    """Asks models and reads what they know and say, row by row."""

    def __init__(self, sets: Sets, tokens: int) -> None:
        self.tokenizer, self.tokens = sets.tokenizer, tokens
        self.batch_size, self.template = sets.script.batch_size, sets.script.qa_template
        self.max_length = sets.script.max_length or _LENGTH

    def side(self, name: str, model: PreTrainedModel, part: Dataset, rest: Dataset) -> Side:
        return Side(name, model, part, rest, self.asked(model, rest, name))

    def asked(self, model: PreTrainedModel, rows: Dataset, name: str) -> list[Asked]:
        """Prompt and answer of each row, the answer cut to the longest that is written."""
        found = [asked(pieces) for pieces in self._encoded(model, rows, name)]
        limit = new_tokens({name: found}, None, self.tokens, length_limit(model, None))
        return [single(one.prompt, one.answer[:limit]) for one in found]

    def tokenized(self, rows: Dataset, role: str, most: int | None = None) -> Dataset:
        """As training has them."""
        some = rows if most is None else sample_rows(rows, most)
        return tokenize_dataset(some, self.tokenizer, role=role, max_length=self.max_length, qa_template=self.template)

    def __call__(self, model: PreTrainedModel, rows: Sequence[Asked]) -> dict[str, list[float]]:
        """`rouge` of the greedy answer (ROUGE-L recall) and `probability` (geometric mean of its tokens'), per row."""
        known = Known.of(model, rows, self.batch_size, None)
        return {"rouge": self.says(model, rows), "probability": [float(np.exp(-one.loss)) for one in known]}

    def says(self, model: PreTrainedModel, rows: Sequence[Asked], **search: Any) -> list[float]:
        """`rouge` of each answer. `search`: `beams` and `processors` of [`generate_ids`]; default: greedy."""
        written = generate_ids(
            model,
            self.tokenizer,
            [row.prompt for row in rows],
            max_new_tokens=max(len(row.answer) for row in rows),
            batch_size=self.batch_size,
            ends=closing_ids(self.tokenizer, {"forget": rows}),
            **search,
        )
        pairs = zip(rows, written, strict=True)
        return [read_answer(self.tokenizer, row.prompt, row.answer, tokens).rouge for row, tokens in pairs]

    def begun(self, rows: Sequence[Asked], words: str) -> list[Asked]:
        """With the first words of an answer put into the model's mouth."""
        gap = "" if has_chat_template(self.tokenizer) else " "
        ids = self.tokenizer(gap + words, add_special_tokens=False)["input_ids"]
        return [single([*row.prompt, *ids], row.answer) for row in rows]

    def with_examples(self, model: PreTrainedModel, rows: Sequence[Asked], solved: Dataset) -> list[Asked]:
        """With solved examples before each question, as many as fit. Raises `ValueError` if none does."""
        first, shots = self._shots(model, solved)
        positions = length_limit(model, None) or 10**9
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        while shots and len(first) + sum(map(len, shots)) + longest > positions:
            shots.pop()
        if not shots:
            raise ValueError(f"No solved example fits beside a question into {positions} positions.")
        before = [*first, *(token for shot in shots for token in shot)]
        return [single([*before, *row.prompt[len(first) :]], row.answer) for row in rows]

    def _shots(self, model: PreTrainedModel, solved: Dataset) -> tuple[list[int], list[list[int]]]:
        first, template = leading_special_ids(self.tokenizer), has_chat_template(self.tokenizer)
        special, shots = set(self.tokenizer.all_special_ids), []
        gap = [] if template else self.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        for pieces in self._encoded(model, solved, "retain"):
            ids = list(pieces[0]["input_ids"])[len(first) :]
            while not template and ids and ids[-1] in special:
                ids.pop()
            shots.append([*ids, *gap])
        return first, shots

    def _encoded(self, model: PreTrainedModel, rows: Dataset, name: str) -> list[list[dict[str, Any]]]:
        limit = length_limit(model, self.max_length)
        return encoded_rows(rows, self.tokenizer, name, limit, self.template)


def single(prompt: list[int], answer: list[int]) -> Asked:
    """One piece, whose answer alone is scored."""
    labels = [IGNORE_INDEX] * len(prompt) + answer
    return Asked([{"input_ids": [*prompt, *answer], "labels": labels}], prompt, answer)
