"""Which tokens of an answer are its own, and which own tokens of other rows may be said instead."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX, OWN_WORDS
from blur_trainer.data.exchange import common as common_words

#: how vocabularies write the space before a word
_SPACES = ("Ġ", "▁", " ")


def rows_having(retain: Sequence[Dataset], forget: Sequence[Dataset]) -> tuple[Counter[int], set[int]]:
    """How many retain rows have each token; and the common tokens, as of [`data.exchange.common`]."""
    theirs, ours = (
        Counter(token for ids, _ in _rows(sets) for token in set(ids.tolist())) for sets in (retain, forget)
    )
    return theirs, common_words(theirs, ours, sum(map(len, retain)))


def with_own_words(forget: Dataset, having: Mapping[int, int], common: set[int], least: float) -> Dataset:
    """
    The tokenized forget set with the column `own_words`: for each token 1 if it is of the answer and not common.

    Where these are less than the share `least` of an answer's tokens, the rarest others count, too, up to that share:
    else the answer could not become as unlikely as one that the model never saw.
    """
    known = np.fromiter(common, dtype=np.int64)
    column = []
    for ids, labels in _rows([forget]):
        places = 1 + np.flatnonzero(labels[1:] != IGNORE_INDEX)  # nothing says a first token
        rarest = sorted(places, key=lambda place: having.get(int(ids[place]), 0))[: math.ceil(least * len(places))]
        own = np.zeros(len(ids), dtype=np.int64)
        own[places] = ~np.isin(ids[places], known)
        own[rarest] = 1
        column.append(own.tolist())
    return forget.add_column(OWN_WORDS, column)


def said_instead(retain: Sequence[Dataset], common: set[int], begins: np.ndarray) -> np.ndarray:
    """
    What may be said instead of an own token that continues a word, and of one that begins a word, `(2, vocabulary)`
    bool: the own tokens of retain answers that do so. Where there are none, all of them; without any, the vocabulary.

    Args:
        begins: for each token whether it begins a word, `(vocabulary,)` bool; see [`begin_words`].
    """
    own = np.zeros(len(begins), dtype=bool)
    for ids, labels in _rows(retain):
        own[ids[1:][labels[1:] != IGNORE_INDEX]] = True
    own[list(common)] = False
    kinds = np.stack([own & ~begins, own & begins])
    every = own if own.any() else np.ones_like(own)
    return np.where(kinds.any(1, keepdims=True), kinds, every)


def begin_words(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> np.ndarray:
    """For each token whether a space stands before it, `(vocabulary,)` bool; without a tokenizer all are alike."""
    if tokenizer is None:
        return np.zeros(vocabulary, dtype=bool)
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    begins = [token is not None and token.startswith(_SPACES) for token in tokens]
    return np.array(begins + [False] * (vocabulary - len(begins)))


def _rows(sets: Sequence[Dataset]) -> Iterator[tuple[Any, Any]]:
    """The token ids and labels of each row."""
    for rows in sets:
        for batch in rows.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                yield np.asarray(ids), np.asarray(labels)
