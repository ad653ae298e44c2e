"""One row of any accepted format -> tokens, with labels -100 on the prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.chat import Rendered, has_chat_template, render
from blur_trainer.data.columns import LEVEL
from blur_trainer.data.given import given_example
from blur_trainer.data.levels import row_level
from blur_trainer.data.preferred import preferred_answers
from blur_trainer.data.rows import check_row, is_blank


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens (usually one BOS, or none) that the tokenizer puts in front of a sequence."""
    bare = _ids(tokenizer, "a")
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    raise ValueError(
        f"{type(tokenizer).__name__} encodes 'a' as {bare} without and as {dressed} with special tokens: which of them "
        "come in front of a sequence cannot be told; tokenize the dataset yourself and pass `input_ids` and `labels`."
    )


def has_target(labels: list[int]) -> bool:
    """Whether any token is a target. Position t predicts the label at t + 1, so the label at 0 never counts."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def split_document(ids: list[int], prefix: list[int], max_length: int | None) -> list[list[int]]:
    """
    Cut a document into pieces of at most `max_length` tokens, each starting with `prefix`. No token is lost.

    Without a prefix, a last piece of one token would have no target, so it takes a token from the piece before.
    """
    room = len(ids) if max_length is None else max_length - len(prefix)
    pieces = [ids[start : start + room] for start in range(0, len(ids), max(room, 1))] or [[]]
    if not prefix and len(pieces) > 1 and len(pieces[-1]) == 1 and room > 2:
        pieces[-1].insert(0, pieces[-2].pop())
    return [prefix + piece for piece in pieces]


def _exchanged(answer: Any, text: str) -> Any:
    """The answer with another text."""
    if isinstance(answer, list):
        return [*answer[:-1], {"role": "assistant", "content": text}]
    # Keep the answer's leading space, so that prompt and text stay separate words.
    return answer[: len(answer) - len(answer.lstrip())] + text.lstrip()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning about long documents, because they are split next.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class RowEncoder:
    """
    Function for a batched, indexed `datasets.map`. Each row becomes one example; a long `text` becomes several.

    Besides `input_ids` and `labels` (and `refusal_*`) the output has the columns `row` (index of the source row) and
    `empty` (no target is left). The caller uses and removes them.
    """

    tokenizer: Any  # a PreTrainedTokenizerBase, or None for tokenized rows
    fmt: str
    role: str
    prefix: list[int]
    max_length: int | None
    refusals: bool
    seed: int
    qa_template: str
    vocab_size: int | None
    day: date | None = None  # today, for templates that write it
    alternatives: bool = False  # `refusal_*` are of the column `alternative`, one example for each
    levels: bool = False  # the column `forget_level` goes along, the same for all examples of a row

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        examples = []
        for position, index in enumerate(indices):
            row = {column: values[position] for column, values in batch.items()}
            examples += self.encode(row, index)
        return {column: [example[column] for example in examples] for column in examples[0]}

    def encode(self, row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        """All examples of one row, checked."""
        check_row(row, index, self.fmt, self.role, has_template=has_chat_template(self.tokenizer))
        examples: list[dict[str, Any]]
        if self.fmt == "text":
            ids = self._with_eos(self._start(_ids(self.tokenizer, row["text"])))
            pieces = split_document(ids[len(self.prefix) :], self.prefix, self.max_length)
            examples = [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
        elif self.fmt == "input_ids":
            examples = [given_example(row, f"row {index} of the `{self.role}` dataset", self.max_length)]
        else:
            examples = self._answered(row, index)
        blank = self._is_blank(row)
        if self.levels:
            examples = [example | {LEVEL: row_level(row, index, self.role)} for example in examples]
        for example in examples:
            self._check_vocabulary(example, index)
            labels = [example[column] for column in ("labels", "refusal_labels") if column in example]
            example.update(row=index, empty=blank or not all(has_target(one) for one in labels))
        return examples

    def rendered(self, row: Mapping[str, Any], index: int) -> Rendered | None:
        """The conversation of a row as text; `None` where no chat template is used."""
        prompt, answer = self.prompt_and_answer(row)
        return self._render(prompt, answer, row, index) if isinstance(prompt, list) else None

    def _is_blank(self, row: Mapping[str, Any]) -> bool:
        """Whether there is nothing to learn or to forget but the end of the text."""
        if self.fmt == "input_ids":
            return False
        return is_blank(row["text"] if self.fmt == "text" else self.prompt_and_answer(row)[1])

    def _answered(self, row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        prompt, answer = self.prompt_and_answer(row)
        ids, labels = self._join(prompt, answer, row, index)
        example = {"input_ids": ids, "labels": labels}
        if not self.refusals:
            return [example]
        made = []
        for text in preferred_answers(row, index, self.role, self.seed, self.alternatives):
            other_ids, other_labels = self._join(prompt, _exchanged(answer, text), row, index)
            made.append({**example, "refusal_input_ids": other_ids, "refusal_labels": other_labels})
        return made

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """Prompt and answer of a row with both: two strings, or two lists of messages."""
        if self.fmt == "messages":
            return row["messages"][:-1], row["messages"][-1:]
        if self.fmt == "prompt-completion":
            return row["prompt"], row["completion"]
        if has_chat_template(self.tokenizer):
            question = {"role": "user", "content": row["question"]}
            return [question], [{"role": "assistant", "content": row["answer"]}]
        # Not str.format: the template may contain other braces (JSON, LaTeX).
        return self.qa_template.replace("{question}", row["question"]), " " + row["answer"]

    def prompt_ids(self, prompt: Any, answer: Any, row: Mapping[str, Any], index: int) -> list[int]:
        """Tokens that a model reads before it answers, as [`encode`] puts them before the answer."""
        if isinstance(prompt, list):
            return _ids(self.tokenizer, self._render(prompt, answer, row, index).prompt)
        return self._start(_ids(self.tokenizer, prompt))

    def _join(self, prompt: Any, answer: Any, row: Mapping[str, Any], index: int) -> tuple[list[int], list[int]]:
        """
        Tokens of prompt and answer. Labels are -100 on the common prefix with the tokenized prompt.

        A chat template writes its own special tokens. Then neither BOS nor EOS is added, as in generation.
        """
        if isinstance(prompt, list):
            text = self._render(prompt, answer, row, index)
            prompt_ids = _ids(self.tokenizer, text.prompt)
            ids = _ids(self.tokenizer, text.prompt + text.answer)
        else:
            prompt_ids = self._start(_ids(self.tokenizer, prompt))
            ids = self._with_eos(self._start(_ids(self.tokenizer, prompt + answer)))
        boundary = common_prefix_length(prompt_ids, ids)
        labels = [IGNORE_INDEX] * boundary + ids[boundary:]
        return ids[: self.max_length], labels[: self.max_length]

    def _render(self, prompt: list, answer: list, row: Mapping[str, Any], index: int) -> Rendered:
        try:
            return render(self.tokenizer, prompt, answer, row, self.day)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"Row {index} of the `{self.role}` dataset cannot be rendered: {said}. Change the row, or give "
                "`prompt` and `completion` as strings."
            ) from error

    def _start(self, ids: list[int]) -> list[int]:
        """`ids` after the tokenizer's BOS. BOS occurs once, even if the text already begins with it."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _check_vocabulary(self, example: Mapping[str, Any], index: int) -> None:
        if self.vocab_size is None:
            return
        for column in ("input_ids", "labels", "refusal_input_ids", "refusal_labels"):
            for token in example.get(column, ()):
                if not (0 <= token < self.vocab_size or (token == IGNORE_INDEX and column.endswith("labels"))):
                    raise ValueError(
                        f"Token id {token} in `{column}` of row {index} of the `{self.role}` dataset is outside of "
                        f"the model's vocabulary of {self.vocab_size}: use the model's own tokenizer, or "
                        "`model.resize_token_embeddings(len(tokenizer))`."
                    )
