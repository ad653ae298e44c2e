"""Which tokens of an answer are its own, and which tokens stand in their place in other rows."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from blur_trainer.constants import IGNORE_INDEX, OWN_WORDS
from blur_trainer.data.exchange import own_limit

#: kinds of places in an answer: its first token, one after a common token, one after an own token
FIRST, AFTER_COMMON, AFTER_OWN = range(3)
#: the least share of an answer's tokens that count as its own
LEAST = 0.2


def rows_having(retain: Sequence[Dataset]) -> tuple[Counter[int], set[int]]:
    """How many retain rows have each token; and the common tokens, which more have than may (`data.exchange`)."""
    having: Counter[int] = Counter()
    rows = 0
    for ids, _ in _rows(retain):
        having.update(set(ids.tolist()))
        rows += 1
    return having, {token for token, count in having.items() if count > own_limit(rows)}


def with_own_words(forget: Dataset, having: Mapping[int, int], common: set[int]) -> Dataset:
    """
    The tokenized forget set with the column `own_words`: for each token 1 if it is of the answer and not common.

    Where these are less than a fifth of an answer's tokens, the rarest others count, too, up to a fifth: else the
    answer could not become as unlikely as one that the model never saw.
    """
    known = np.fromiter(common, dtype=np.int64)
    column = []
    for ids, labels in _rows([forget]):
        places = 1 + np.flatnonzero(labels[1:] != IGNORE_INDEX)  # nothing says a first token
        rarest = sorted(places, key=lambda place: having.get(int(ids[place]), 0))[: math.ceil(LEAST * len(places))]
        own = np.zeros(len(ids), dtype=np.int64)
        own[places] = ~np.isin(ids[places], known)
        own[rarest] = 1
        column.append(own.tolist())
    return forget.add_column(OWN_WORDS, column)


def said_in_place(retain: Sequence[Dataset], common: set[int], vocabulary: int) -> np.ndarray:
    """
    For each kind of place the own tokens that retain answers have there, `(3, vocabulary)` bool.

    A kind of place that no retain answer has gets those of all kinds; without any own token, it is the vocabulary.
    """
    known, said = np.fromiter(common, dtype=np.int64), np.zeros((3, vocabulary), dtype=bool)
    for ids, labels in _rows(retain):
        own = ~np.isin(ids, known)
        kind = np.where(labels[:-1] == IGNORE_INDEX, FIRST, np.where(own[:-1], AFTER_OWN, AFTER_COMMON))
        counts = own[1:] & (labels[1:] != IGNORE_INDEX)
        said[kind[counts], ids[1:][counts]] = True
    every = said.any(0) if said.any() else np.ones(vocabulary, dtype=bool)
    return np.where(said.any(1, keepdims=True), said, every)


def _rows(sets: Sequence[Dataset]) -> Iterator[tuple[Any, Any]]:
    """The token ids and labels of each row."""
    for rows in sets:
        for batch in rows.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                yield np.asarray(ids), np.asarray(labels)
