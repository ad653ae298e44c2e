"""The sets of a [`ForgetEvaluation`]: a user's rows -> what is scored, what the model is asked, and the true answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.sources import check_dataset, column_names

#: the sets in the order of the table
SETS = ("forget", "paraphrased", "retain", "hold", "unseen")
#: a column of the forget set that makes the set `paraphrased`
PARAPHRASED = "paraphrased_question"


@dataclass(frozen=True)
class Asked:
    """
    One row as tokens.

    Args:
        pieces: what is scored, `input_ids` and `labels` as training has them; a long text has several pieces.
        prompt: what the model is asked: all tokens before the first target. Of a text, where all tokens are targets,
            the first half of its first piece.
        answer: the true tokens from there to the last target.
    """

    pieces: list[dict[str, Any]]
    prompt: list[int]
    answer: list[int]


def asked(pieces: Sequence[Mapping[str, Any]]) -> Asked:
    """What the examples of one row ask."""
    ids, labels = list(pieces[0]["input_ids"]), list(pieces[0]["labels"])
    targets = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
    start = targets[0] if targets[0] > 0 else max(1, len(ids) // 2)
    kept = [{"input_ids": list(piece["input_ids"]), "labels": list(piece["labels"])} for piece in pieces]
    return Asked(kept, ids[:start], ids[start : targets[-1] + 1])


def own_sets(
    forget: Any, retain: Any, hold: Any, unseen: Any, paraphrased: Any, max_rows: int | None
) -> tuple[dict[str, Any], list[int]]:
    """
    The sets that are there, each with at most `max_rows` rows at equal distances, and the indices of the forget rows.

    Without `paraphrased`, the forget set's column `paraphrased_question` makes that set.
    """
    given = {"forget": forget, "paraphrased": paraphrased, "retain": retain, "hold": hold, "unseen": unseen}
    for name, rows in given.items():
        if rows is not None or name == "forget":
            check_dataset(rows, name)
    sampled = {name: _sample(given[name], max_rows) for name in SETS if given[name] is not None}
    found = {name: rows for name, (rows, _) in sampled.items()}
    if paraphrased is None and {PARAPHRASED, "question"} <= set(column_names(found["forget"])):
        rows = [{**row, "question": row[PARAPHRASED]} for row in found["forget"]]
        found = {"forget": found["forget"], "paraphrased": rows, **found}
    return found, sampled["forget"][1]


def _sample(rows: Any, count: int | None) -> tuple[Any, list[int]]:
    """The rows, the same ones every time, and their indices. Of a stream the first ones."""
    if isinstance(rows, IterableDataset):
        if count is None:
            raise ValueError("`max_rows=None` reads all rows, and a stream may have no end: give a number.")
        first = [dict(row) for row in islice(rows, count)]
        return first, list(range(len(first)))
    size = len(rows)
    chosen = range(size) if count is None else np.linspace(0, size - 1, min(size, count)).round().astype(int)
    indices = [int(index) for index in chosen]
    return rows.select(indices) if isinstance(rows, Dataset) else [rows[index] for index in indices], indices


def closing_ids(tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[Asked]]) -> list[int]:
    """The special tokens that close true answers. A chat template's may be missing in the generation configuration."""
    special = set(tokenizer.all_special_ids)
    ends = (next((token for token in reversed(row.answer) if token in special), None) for row in _all(sets))
    return sorted({token for token in ends if token is not None})


def new_tokens(sets: Mapping[str, Sequence[Asked]], wanted: int | None, most: int, positions: int | None) -> int:
    """How long an answer may become: `wanted`, else the longest true answer up to `most`; within the positions."""
    longest = max(len(row.answer) for row in _all(sets))
    limit = min(longest, most) if wanted is None else wanted
    return limit if positions is None else min(limit, positions - max(len(row.prompt) for row in _all(sets)))


def _all(sets: Mapping[str, Sequence[Asked]]) -> list[Asked]:
    return [row for rows in sets.values() for row in rows]
