"""How many tokens an example begins with that another one begins with, too."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset

from blur_trainer.constants import SHARED_START

_BYTES = 4  # of a token; big-endian, so that bytes are sorted as tokens are


def with_repeated_starts(retain: Dataset) -> Dataset:
    """The tokenized retain set with the column `shared_start`, int64 `(rows,)`, of [`repeated_starts`]."""
    return retain.add_column(SHARED_START, repeated_starts(list(_tokens(retain))))


def repeated_starts(retain: Sequence[Any]) -> list[int]:
    """
    For each retain example (its token ids) the start that one before it has, in tokens, where the examples are sorted.

    What is left are all starts of all examples, each of them once: a system prompt that all have is left in one. The
    last token of an example is always left.
    """
    rows = [_packed(ids) for ids in retain]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    repeated = [0] * len(rows)
    for one, other in pairwise(order):
        repeated[other] = min(_common(rows[one], rows[other]), len(retain[other]) - 1)
    return repeated


def common_start(rows: Sequence[Any]) -> list[int]:
    """The longest start (token ids) that more than half of the examples have."""
    ordered = sorted(map(_packed, rows))
    pairs = zip(ordered, ordered[len(ordered) // 2 :], strict=False)  # what two sorted rows share, all between them do
    longest, row = max((_common(*pair), pair[0]) for pair in pairs)
    return np.frombuffer(row, f">u{_BYTES}")[:longest].tolist()


def with_shared_starts(forget: Dataset, retain: Sequence[Dataset]) -> Dataset:
    """The tokenized forget set with the column `shared_start`, int64 `(rows,)`, against all tokenized retain sets."""
    kept = (ids for rows in retain for ids in _tokens(rows))
    return forget.add_column(SHARED_START, shared_starts(list(_tokens(forget)), kept))


def shared_starts(forget: Sequence[Any], retain: Iterable[Any]) -> list[int]:
    """
    For each forget example (its token ids) the longest start that it shares with a retain example, in tokens.

    A causal model has the same activations on the same start, so there nothing can be steered in one and held in the
    other. An example that is the start of a retain example as a whole gets 0: it has nothing else.

    Each retain example is compared with its two neighbours among the sorted forget examples. What one shares with a
    neighbour, others share as far as they share that neighbour's start. Memory: 4 bytes per forget token.
    """
    rows = [_packed(ids) for ids in forget]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    ordered = [rows[index] for index in order]
    shared = [0] * len(rows)
    for one in map(_packed, retain):
        place = bisect_left(ordered, one)
        for near in range(max(place - 1, 0), min(place + 1, len(rows))):
            shared[near] = max(shared[near], _common(ordered[near], one))
    alike = [_common(*pair) for pair in pairwise(ordered)]
    for place, common in enumerate(alike):
        shared[place + 1] = max(shared[place + 1], min(shared[place], common))
    for place, common in reversed(list(enumerate(alike))):
        shared[place] = max(shared[place], min(shared[place + 1], common))
    found = dict(zip(order, shared, strict=True))
    return [found[index] if found[index] < len(ids) else 0 for index, ids in enumerate(forget)]


def _tokens(dataset: Dataset) -> Iterator[np.ndarray]:
    for batch in dataset.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=1000):
        yield from batch["input_ids"]


def _packed(ids: Any) -> bytes:
    return np.asarray(ids).astype(f">u{_BYTES}").tobytes()


def _common(one: bytes, other: bytes) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other)) // _BYTES
    pair = [np.frombuffer(each, f">u{_BYTES}", length) for each in (one, other)]
    differs = pair[0] != pair[1]
    return int(differs.argmax()) if differs.any() else length
