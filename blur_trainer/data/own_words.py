"""Which tokens of an answer are its own, and which tokens stand in their place in other rows."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from blur_trainer.constants import IGNORE_INDEX, OWN_WORDS
from blur_trainer.data.exchange import own_limit

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


class SaidElsewhere:
    """
    Which own tokens retain answers have in a place like that of a forget answer's: after the same common token, or
    after any own one. Where they have none, all their own tokens; without any, the vocabulary.
    """

    def __init__(self, retain: Sequence[Dataset], common: set[int], vocabulary: int) -> None:
        after: dict[int | None, set[int]] = defaultdict(set)
        for ids, labels in _rows(retain):
            for before, token, label in zip(ids[:-1].tolist(), ids[1:].tolist(), labels[1:].tolist(), strict=True):
                if label != IGNORE_INDEX and token not in common:
                    after[before if before in common else None].add(token)
        self.common, self.after = common, {before: np.array(sorted(tokens)) for before, tokens in after.items()}
        self.others = [np.array(sorted(set().union(*after.values())), dtype=np.int64), np.arange(vocabulary)]

    def instead_of(self, ids: Sequence[int], place: int) -> np.ndarray:
        """The other tokens that may be said instead of `ids[place]`."""
        before = ids[place - 1] if ids[place - 1] in self.common else None
        for tokens in (self.after.get(before, self.others[0]), *self.others):
            if len(others := tokens[tokens != ids[place]]):
                break
        return others


def _rows(sets: Sequence[Dataset]) -> Iterator[tuple[Any, Any]]:
    """The token ids and labels of each row."""
    for rows in sets:
        for batch in rows.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                yield np.asarray(ids), np.asarray(labels)
