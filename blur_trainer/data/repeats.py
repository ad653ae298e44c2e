"""Which texts repeat a set of rows: those that share a run of words with it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from blur_trainer.data.columns import FORMATS, find_format
from blur_trainer.data.rows import with_texts
from blur_trainer.data.sources import check_dataset, column_names, plain


def row_texts(dataset: Any, tokenizer: PreTrainedTokenizerBase, role: str) -> Iterator[str]:
    """The texts of a dataset in any accepted format: prompts and answers one by one, without a template's words."""
    check_dataset(dataset, role)
    fmt = find_format(column_names(dataset), role)
    for row in dataset:
        if fmt == "input_ids":
            yield tokenizer.batch_decode([plain(row["input_ids"])], skip_special_tokens=True)[0]
            continue
        for value in (row[column] for column in FORMATS[fmt]):
            if isinstance(value, str):
                yield value
            else:
                yield from (message.get("content") or "" for message in with_texts(value))


def same_rows(rows: Any, others: Iterable[Any], tokenizer: PreTrainedTokenizerBase, role: str) -> list[bool]:
    """Whether each row is in one of the `others`, by prompt and answer, in whatever format. White space aside."""

    def texts(dataset: Any) -> Iterator[str]:
        for row in dataset:
            yield " ".join(" ".join(row_texts([row], tokenizer, role)).split())

    known = {text for dataset in others for text in texts(dataset)}
    return [text in known for text in texts(rows)]


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    """The runs of `length` words in a text. Case and punctuation do not count."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def own_runs(forget: Iterable[str], retain: Iterable[str], length: int) -> set[tuple[str, ...]]:
    """The runs of words that are in `forget` and not in `retain`."""
    found = [set().union(*(word_runs(text, length) for text in texts)) for texts in (forget, retain)]
    return found[0] - found[1]


def repeating(texts: Sequence[str], runs: set[tuple[str, ...]], length: int) -> list[bool]:
    """Whether each text has one of these runs of words."""
    return [not runs.isdisjoint(word_runs(text, length)) for text in texts]
