"""One row of any accepted format -> tokens, with labels -100 on the prompt."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, common_prefix_length, is_conversational

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.columns import check_row
from blur_trainer.data.refusals import REFUSALS


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
    """Whether any token is predicted: position t predicts the label at t + 1, so the label at 0 is no target."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def split_document(ids: list[int], prefix: list[int], max_length: int | None) -> list[list[int]]:
    """
    Cut a document into pieces of at most `max_length` tokens, each starting with `prefix`; nothing is lost.

    Without a prefix a last piece of one token would have nothing to predict; it takes a token from its neighbor.
    """
    room = len(ids) if max_length is None else max_length - len(prefix)
    pieces = [ids[start : start + room] for start in range(0, len(ids), max(room, 1))] or [[]]
    if not prefix and len(pieces) > 1 and len(pieces[-1]) == 1 and room > 2:
        pieces[-1].insert(0, pieces[-2].pop())
    return [prefix + piece for piece in pieces]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a document longer than the context is about to be split, no reason to warn.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class RowEncoder:
    """
    Callable for a batched, indexed `datasets.map`: each row becomes one example, a long `text` several.

    The output has, besides `input_ids` and `labels` (and `refusal_*`), the columns `row` (where the example comes
    from) and `empty` (no target is left), for the caller to act on and remove.
    """

    tokenizer: Any  # a PreTrainedTokenizerBase, or None for rows that are tokens already
    fmt: str
    role: str
    prefix: list[int]
    max_length: int | None
    refusals: bool
    seed: int
    qa_template: str
    vocab_size: int | None

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        examples = []
        for position, index in enumerate(indices):
            row = {column: values[position] for column, values in batch.items()}
            examples += self.encode(row, index)
        return {column: [example[column] for example in examples] for column in examples[0]}

    def encode(self, row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        """All examples of one row, checked."""
        check_row(
            row, index, self.fmt, self.role, has_template=getattr(self.tokenizer, "chat_template", None) is not None
        )
        examples: list[dict[str, Any]]
        if self.fmt == "text":
            ids = self._with_eos(self._start(_ids(self.tokenizer, row["text"])))
            pieces = split_document(ids[len(self.prefix) :], self.prefix, self.max_length)
            examples = [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
        elif self.fmt == "input_ids":
            examples = [self._given(row, index)]
        else:
            examples = [self._answered(row, index)]
        for example in examples:
            self._check_vocabulary(example, index)
            labels = [example[column] for column in ("labels", "refusal_labels") if column in example]
            example.update(row=index, empty=not all(has_target(one) for one in labels))
        return examples

    def _given(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        example = {"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])}
        example |= {column: row[column] for column in ("refusal_input_ids", "refusal_labels") if column in row}
        scores = {column: row[column] for column in ("ref_logps", "refusal_ref_logps") if column in row}
        cut = {column: ids[: self.max_length] for column, ids in example.items()}
        if scores and cut != example:
            raise ValueError(
                f"Row {index} of the `{self.role}` dataset is longer than max_length={self.max_length}, but its "
                f"{list(scores)} belong to the whole sequence: raise `max_length` or remove these columns."
            )
        return cut | scores

    def _answered(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        prompt, answer = self._prompt_and_answer(row)
        kwargs = row.get("chat_template_kwargs")
        ids, labels = self._join(prompt, answer, kwargs)
        if not self.refusals:
            return {"input_ids": ids, "labels": labels}
        refusal_ids, refusal_labels = self._join(prompt, self._refusal(row, index, answer), kwargs)
        return {
            "input_ids": ids,
            "labels": labels,
            "refusal_input_ids": refusal_ids,
            "refusal_labels": refusal_labels,
        }

    def _prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """Two strings, or two lists of messages."""
        if self.fmt == "messages":
            return row["messages"][:-1], row["messages"][-1:]
        if self.fmt == "prompt-completion":
            return row["prompt"], row["completion"]
        if self.tokenizer.chat_template is not None:
            question = {"role": "user", "content": row["question"]}
            return [question], [{"role": "assistant", "content": row["answer"]}]
        # Not str.format: other braces in the template (JSON, LaTeX) are text.
        return self.qa_template.replace("{question}", row["question"]), " " + row["answer"]

    def _refusal(self, row: Mapping[str, Any], index: int, answer: Any) -> Any:
        """The row's own refusal, or one drawn from the seed and the row index alone: any process draws the same."""
        if "refusal" in row:
            text = row["refusal"]
            if not isinstance(text, str):
                raise TypeError(
                    f"Column `refusal` in row {index} of the `{self.role}` dataset is a {type(text).__name__}: it "
                    "must be a string."
                )
        else:
            text = random.Random(f"{self.seed}-{index}").choice(REFUSALS)
        if isinstance(answer, list):
            return [*answer[:-1], {"role": "assistant", "content": text}]
        # The answer's own leading space, so that the refusal does not stick to the prompt.
        return answer[: len(answer) - len(answer.lstrip())] + text.lstrip()

    def _join(self, prompt: Any, answer: Any, template_kwargs: dict | None) -> tuple[list[int], list[int]]:
        """
        Tokens of prompt and answer, labels -100 on the common prefix with the tokenized prompt.

        A chat template writes its own special tokens: then neither BOS nor EOS is added, as in generation.
        """
        if is_conversational({"prompt": prompt}):
            example = {"prompt": prompt, "completion": answer, "chat_template_kwargs": template_kwargs or {}}
            text = apply_chat_template(example, self.tokenizer)
            prompt_ids = _ids(self.tokenizer, text["prompt"])
            ids = _ids(self.tokenizer, text["prompt"] + text["completion"])
        else:
            prompt_ids = self._start(_ids(self.tokenizer, prompt))
            ids = self._with_eos(self._start(_ids(self.tokenizer, prompt + answer)))
        boundary = common_prefix_length(prompt_ids, ids)
        labels = [IGNORE_INDEX] * boundary + ids[boundary:]
        return ids[: self.max_length], labels[: self.max_length]

    def _start(self, ids: list[int]) -> list[int]:
        """`ids` behind the tokenizer's BOS, which is there exactly once even if the text spells it."""
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
