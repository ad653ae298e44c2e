"""Which tokens of an answer are its own, and which own tokens of other rows may be said instead."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX, KINDS, OWN_WORDS
from blur_trainer.data.exchange import common as common_words

#: how vocabularies write the space before a word
_SPACES = ("Ġ", "▁", " ")


def rows_having(retain: Sequence[Dataset], forget: Sequence[Dataset]) -> tuple[Counter[int], set[int]]:
    """How many retain rows have each token; and the common tokens, as of [`data.exchange.common`]."""
    kept = {ids.tobytes() for ids, _ in _rows(retain)}  # a row of both counts once
    both = (ids for ids, _ in _rows(retain)), (ids for ids, _ in _rows(forget) if ids.tobytes() not in kept)
    theirs, ours = (Counter(token for ids in of for token in set(ids.tolist())) for of in both)
    return theirs, common_words(theirs, ours, sum(map(len, retain)))


def with_own_words(forget: Dataset, having: Mapping[int, int], common: set[int], least: float) -> Dataset:
    """
    The tokenized forget set with the column `own_words`: for each token 0, or 1 and its kind if it is of the answer and
    not common.

    Where these are less than the share `least` of an answer's tokens, the rarest others count, too, up to that share:
    else the answer could not become as unlikely as one that the model never saw.

    What stands before a word says what kind of word it is: `was a` a trade, a first name a family name. So its kind is
    the common token before it, of those that most own words follow, or that it is another own word. The last kind is
    that of all others.
    """
    known = np.fromiter(common, dtype=np.int64)
    own: list[list[int]] = []
    before: Counter[int | None] = Counter()
    for ids, labels in _rows([forget]):
        places = 1 + np.flatnonzero(labels[1:] != IGNORE_INDEX)  # nothing says a first token
        rarest = sorted(places, key=lambda place: having.get(int(ids[place]), 0))[: math.ceil(least * len(places))]
        own.append(sorted({*places[~np.isin(ids[places], known)].tolist(), *map(int, rarest)}))
        before.update(_before(ids, each, common) for each in own[-1])
    kinds = {token: kind for kind, (token, _) in enumerate(before.most_common(KINDS - 1))}
    column = []
    for (ids, _), chosen in zip(_rows([forget]), own, strict=True):
        row = [0] * len(ids)
        for place in chosen:
            row[place] = 1 + kinds.get(_before(ids, place, common), KINDS - 1)
        column.append(row)
    return forget.add_column(OWN_WORDS, column)


def kinds_of(forget: Dataset, common: set[int]) -> dict[int | None, int]:
    """The kinds of [`with_own_words`], read from its column: of the token before, `None` for an own word."""
    kinds: dict[int | None, int] = {}
    for (ids, _), own in zip(_rows([forget]), forget[OWN_WORDS], strict=True):
        kinds |= {_before(ids, place, common): kind - 1 for place, kind in enumerate(own) if 0 < kind < KINDS}
    return kinds


def _before(ids: Any, place: int, common: set[int]) -> int | None:
    token = int(ids[place - 1])
    return token if token in common else None


def said_instead(
    retain: Sequence[Dataset], common: set[int], begins: np.ndarray, kinds: Mapping[int | None, int]
) -> np.ndarray:
    """
    What may be said instead of an own token of each kind that continues a word, and of one that begins a word,
    `(kinds, 2, vocabulary)` bool: the own tokens of retain answers that do so and are of this kind. Where there are
    none, of all kinds; without any, those that do either. Where no answer has an own token, of the vocabulary.

    Args:
        begins: for each token whether it begins a word, `(vocabulary,)` bool; see [`begin_words`].
        kinds: of [`kinds_of`].
    """
    kind = np.full(len(begins), kinds.get(None, KINDS - 1))
    kind[list(common)] = KINDS - 1
    for token in kinds.keys() - {None}:
        kind[token] = kinds[token]
    own = np.zeros((KINDS, len(begins)), dtype=bool)
    for ids, labels in _rows(retain):
        answers = labels[1:] != IGNORE_INDEX
        own[kind[ids[:-1]][answers], ids[1:][answers]] = True
    own[:, list(common)] = False
    every = _or_all(np.logical_or.reduce(own), np.ones(len(begins), dtype=bool))
    alike = _or_all(np.stack([every & ~begins, every & begins]), every)
    return _or_all(own[:, None] & alike, alike)


def _or_all(found: np.ndarray, every: np.ndarray) -> np.ndarray:
    """`every` where nothing was found."""
    return np.where(found.any(-1, keepdims=True), found, every)


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
