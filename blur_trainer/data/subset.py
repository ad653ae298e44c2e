"""Small consistent parts of a benchmark, for runs of minutes instead of hours."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict

Rows = TypeVar("Rows", Dataset, list[Any])
GROUPS = ("forget", "retain", "hold")
CUT_FROM_DOCUMENTS = ("verbmem", "privleak")


def limit_documents(data: DatasetDict, n: int, seed: int = 0) -> DatasetDict:
    """
    A consistent part of `data`: at most `n` documents to forget, `n` to retain, `n` rows of everything else.

    MUSE cuts its VerbMem and PrivLeak texts from the concatenated articles (in MUSE-News all 100 of either are found
    there, only 14 and 2 of them inside one article). So a text spans one to about four neighboring documents.
    Documents are chosen so that they contain whole texts: texts that need the fewest documents first, VerbMem and
    PrivLeak in turn. The remaining places go to random documents.

    Args:
        data ([`~datasets.DatasetDict`]):
            In MUSE's schema.
        n (`int`):
            Documents of each group, and rows of each other split.
        seed (`int`, defaults to `0`):
            Of all random choices.

    Returns:
        [`~datasets.DatasetDict`]: `raw_*` in their order. `verbmem_*` and `privleak_*` keep the rows that the chosen
        documents of their group contain completely. `knowmem_*`, and a split that no document contains
        (`privleak_holdout`), keep random rows. `scal_*` and `sust_*` are left out: their folds would not be MUSE's.

    Raises:
        `ValueError`: `n` is not positive, or so small that no text lies wholly in `n` documents.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; it takes a whole number of documents, at least 1.")
    small = DatasetDict()
    for group in GROUPS:
        if f"raw_{group}" not in data:
            continue
        documents = data[f"raw_{group}"]
        spans = {}
        for key in (f"{config}_{group}" for config in CUT_FROM_DOCUMENTS):
            if key in data:
                spans[key] = locate(documents["text"], _passages(data[key]))
        chosen = _choose(len(documents), spans, n, seed)
        small[f"raw_{group}"] = documents.select(sorted(chosen))
        for key, rows in spans.items():
            if any(rows):
                kept = [i for i, span in enumerate(rows) if span and chosen.issuperset(span)]
                small[key] = data[key].select(kept[:n])
    for key in data:
        if key not in small and not key.startswith(("scal_", "sust_")):
            small[key] = sample_rows(data[key], n, seed)
    return DatasetDict({key: small[key] for key in data if key in small})


def _passages(rows: Dataset) -> list[str]:
    """Each row as one text: a VerbMem row is its prompt and what follows it."""
    return [
        "".join(row.values())
        for row in rows.select_columns([c for c in ("prompt", "gt", "text") if c in rows.features])
    ]


def locate(documents: Sequence[str], passages: Sequence[str]) -> list[range]:
    """
    For each passage, the indices of the documents that it spans; empty if it is not found.

    Whitespace is ignored, because the Hub's texts have lost it between articles and at the cut of a VerbMem row.
    """
    bare = ["".join(document.split()) for document in documents]
    starts = [0]
    for document in bare:
        starts.append(starts[-1] + len(document))
    everything = "".join(bare)
    spans = []
    for passage in passages:
        wanted = "".join(passage.split())
        at = everything.find(wanted)
        first, last = (bisect_right(starts, position) - 1 for position in (at, at + len(wanted) - 1))
        spans.append(range(first, last + 1) if wanted and at >= 0 else range(0))
    return spans


def _choose(total: int, spans: dict[str, list[range]], n: int, seed: int) -> set[int]:
    """Indices of min(n, total) documents: first those of whole spans, the splits in turn, then random ones."""
    draw = random.Random(seed)
    chosen: set[int] = set()
    for span in _in_turn(spans, draw):
        if len(chosen.union(span)) <= n:
            chosen.update(span)
    for key, rows in spans.items():
        if any(rows) and not any(span and chosen.issuperset(span) for span in rows):
            need = sum(min(map(len, filter(None, rows))) for rows in spans.values() if any(rows))
            raise ValueError(
                f"n={n} documents hold no whole text of {key!r}; n={need} is enough for one of each of {list(spans)}."
            )
    rest = [i for i in range(total) if i not in chosen]
    draw.shuffle(rest)
    return chosen.union(rest[: n - len(chosen)])


def _in_turn(spans: dict[str, list[range]], draw: random.Random) -> Iterator[range]:
    """The shortest span of each split, then the second shortest, and so on. Equally long spans come in random order."""
    columns = []
    for rows in spans.values():
        found = [span for span in rows if span]
        draw.shuffle(found)
        columns.append(sorted(found, key=len))
    for turn in zip_longest(*columns, fillvalue=range(0)):
        yield from filter(None, turn)


def sample_rows(rows: Rows, n: int, seed: int = 0) -> Rows:
    """
    At most `n` random rows, drawn from `seed`, in their original order. For example a few rows to relearn.

    Args:
        rows ([`~datasets.Dataset`] or `list`):
            Any one set; what comes back is of the same kind.
        n (`int`):
            How many; of a set with fewer rows all of them.
        seed (`int`, defaults to `0`):
            Of the random choice.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; it takes a whole number of rows, at least 1.")
    if not isinstance(rows, (Dataset, list)):
        raise TypeError(f"rows is a `{type(rows).__name__}`; it takes one `Dataset`, such as data['forget'], or list.")
    indices = sorted(random.Random(seed).sample(range(len(rows)), min(n, len(rows))))
    return rows.select(indices) if isinstance(rows, Dataset) else [rows[index] for index in indices]


def limit_rows(data: DatasetDict, n: int, seed: int = 0) -> DatasetDict:
    """
    A consistent part of `data`: at most `n` rows of each set, and the same questions in a set and its `*_perturbed`.

    Args:
        data ([`~datasets.DatasetDict`]):
            In TOFU's schema: sets with a column `question`.
        n (`int`):
            Rows of each set.
        seed (`int`, defaults to `0`):
            Of the random choice.

    Returns:
        [`~datasets.DatasetDict`]: the same keys, rows in their order. A set that has a `*_perturbed` set keeps the
        questions chosen there, plus others up to `n`. So the evaluated questions are among the trained ones.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; it takes a whole number of rows, at least 1.")
    small = DatasetDict({key: sample_rows(rows, n, seed) for key, rows in data.items()})
    for key in data:
        if f"{key}_perturbed" in data:
            wanted = set(small[f"{key}_perturbed"]["question"])
            first = [i for i, question in enumerate(data[key]["question"]) if question in wanted][:n]
            rest = sorted(set(range(len(data[key]))).difference(first))
            rest = random.Random(seed).sample(rest, min(n - len(first), len(rest)))
            small[key] = data[key].select(sorted(first + rest))
    return small
