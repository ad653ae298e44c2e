"""Rows of the same form that say something else: words of their own exchanged for words of other rows."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.columns import FORMATS

#: docs/evidence.md has the numbers for others
OWN, FEW = 0.02, 2


def common(reference: Mapping[Any, int], rows: Mapping[Any, int], size: int) -> set[Any]:
    """
    The words that more than 2 % of the reference rows have, and more than two rows of reference and rows together.

    So where the reference is small, one of its rows is enough for a word that many of the rows have, too. Any other
    word is own.

    Args:
        reference, rows: for each word how many rows have it; a row of both counts in the reference.
        size: rows of the reference.
    """
    return {word for word, count in reference.items() if count > int(OWN * size) and count + rows.get(word, 0) > FEW}


_EVERY = object()  # the pool of all kinds

# scripts that put no spaces between words (Thai to Khmer, kana, Han): a character is a word
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# with the marks of Arabic and Indian scripts, which `\w` leaves out
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\w\u0300-\u036f\u064b-\u065f\u0900-\u0dff])+")
_CHARACTER = re.compile(f"[{_UNSPACED}]")


class Exchange:
    """
    Exchanges words that are not common ([`common`]) for others of the reference that are not, alike all over a row.

    The new word is drawn from those of the reference, by how often they stand there. It is of the same kind if one is:
    a number, a word with a capital, one without.

    Args:
        reference, rows: for each row its words.
        kind: of a word.
        key: what makes two words the same.
    """

    def __init__(
        self,
        reference: Iterable[Sequence[Any]],
        rows: Iterable[Sequence[Any]],
        kind: Callable[[Any], Hashable] = lambda word: None,
        key: Callable[[Any], Hashable] = lambda word: word,
        seed: int = 0,
    ) -> None:
        bags = list(reference)
        self.kind, self.key, self.draw = kind, key, random.Random(seed)
        known = set(map(tuple, bags))  # a row of both counts once
        both = ([bag for bag in rows if tuple(bag) not in known], bags)
        ours, theirs = (Counter(each for bag in of for each in set(map(key, bag))) for of in both)
        self.common = common(theirs, ours, len(bags))
        self.pools: dict[Hashable, list[Any]] = defaultdict(list)
        self.places: dict[Hashable, list[int]] = defaultdict(list)  # of each word in each pool
        for word in (word for bag in bags for word in bag if self.is_own(word)):
            for of in (kind(word), _EVERY):
                self.places[of, key(word)].append(len(self.pools[of]))
                self.pools[of].append(word)

    def is_own(self, word: Any) -> bool:
        return self.key(word) not in self.common

    def another(self, word: Any) -> Any | None:
        """Another word, or `None` if there is none."""
        for of in (self.kind(word), _EVERY):
            pool, same = self.pools[of], self.places[of, self.key(word)]
            if len(pool) > len(same):
                place = self.draw.randrange(len(pool) - len(same))
                for other in same:  # in ascending order: leaves them out without a copy of the pool
                    place += other <= place
                return pool[place]
        return None


class RowExchange:
    """What one row's words become. `made` is empty as long as the row has no word of its own."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.made: dict[Hashable, Any] = {}

    def __call__(self, word: Any) -> Any:
        if not self.exchange.is_own(word):
            return word
        key = self.exchange.key(word)
        if key not in self.made:
            other = self.exchange.another(word)
            if other is None:
                return word
            self.made[key] = other
        return self.made[key]


def exchanged_texts(
    rows: Iterable[Mapping[str, Any]], fmt: str, reference: Iterable[Sequence[str]], draws: int = 1
) -> list[list[dict[str, Any]]]:
    """
    For each row so many texts whose own words are exchanged, in question and answer alike; none for a row without such
    a word.

    Args:
        rows: with the columns of their format.
        fmt: a name in `FORMATS`, other than `input_ids`.
        reference: the texts of each row of another set, which say which words are rare: see [`texts_of`].
    """
    rows = list(rows)
    ours, theirs = (
        [[word for text in texts for word in _WORD.findall(text)] for texts in of]
        for of in ((texts_of(row, fmt) for row in rows), reference)
    )

    def changed(row: Mapping[str, Any], change: RowExchange) -> dict[str, Any]:
        return {**row, **{name: _changed(row[name], partial(_in_text, change)) for name in FORMATS[fmt]}}

    return _exchanged(rows, changed, Exchange(theirs, ours, _kind_of, str.casefold), draws)


def exchanged_tokens(
    examples: Iterable[Mapping[str, Any]], reference: Iterable[Mapping[str, Any]], draws: int = 1
) -> list[list[dict[str, Any]]]:
    """The same with tokens for words: of examples with `input_ids` and `labels`."""
    examples = list(examples)
    ours, theirs = ([example["input_ids"] for example in of] for of in (examples, reference))

    def changed(row: Mapping[str, Any], change: RowExchange) -> dict[str, Any]:
        ids = [change(token) for token in row["input_ids"]]
        labels = [label if label == IGNORE_INDEX else token for token, label in zip(ids, row["labels"], strict=True)]
        return {**row, "input_ids": ids, "labels": labels}

    return _exchanged(examples, changed, Exchange(theirs, ours), draws)


def _exchanged(
    rows: Iterable[Mapping[str, Any]],
    changed: Callable[[Mapping[str, Any], RowExchange], dict[str, Any]],
    exchange: Exchange,
    draws: int,
) -> list[list[dict[str, Any]]]:
    made = []
    for row in rows:
        changes = [RowExchange(exchange) for _ in range(draws)]
        drawn = [changed(row, change) for change in changes]
        made.append(drawn if changes[0].made else [])
    return made


def _in_text(change: RowExchange, text: str) -> str:
    def put(found: re.Match[str]) -> str:
        word, other = found.group(), change(found.group())
        return other[0].upper() + other[1:] if word[0].isupper() else other

    return _WORD.sub(put, text)


def _kind_of(word: str) -> str:
    if _CHARACTER.match(word):
        return "character"
    if any(map(str.isdigit, word)):
        return "number"
    return "capital" if word[0].isupper() else "plain"


def texts_of(row: Mapping[str, Any], fmt: str) -> list[str]:
    """What a row says, column by column, message by message."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    for name in FORMATS[fmt]:
        _changed(row[name], keep)
    return found


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A text, or the contents of messages, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(each, change) for each in value]
    if isinstance(value, Mapping):
        return {key: _changed(each, change) if key in ("content", "text") else each for key, each in value.items()}
    return value
