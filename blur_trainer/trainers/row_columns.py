"""Columns that objectives ask for, made of both tokenized sets."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import datasets

from blur_trainer.data.own_words import rows_having, with_own_words
from blur_trainer.data.shared_start import with_repeated_starts, with_shared_starts
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers.retain_sets import Tokenized


def with_columns(forget: Any, retain: Any, objectives: Mapping[str, Objective]) -> tuple[Any, Any]:
    """Both sets, or those of all topics, with the columns that their objective may need."""
    starts = {role for role, objective in objectives.items() if objective.needs_shared_start}
    least = objectives["forget"].needs_own_words
    own_words = least is not None
    kept = [rows for _, rows in named("retain", retain)]
    read = [*kept, *(rows for _, rows in named("forget", forget) if "forget" in starts or own_words)]
    for asks, option in ((starts, "skip_shared_start"), (own_words, "own_words")):
        if asks and any(not isinstance(rows, datasets.Dataset) for rows in read):
            raise TypeError(
                f"`{option}` compares each example with the whole retain set, and there is a stream: load it, or "
                "leave the option out."
            )
    if own_words and not kept:
        raise ValueError("`own_words` needs a retain set, which says what other rows have: pass `retain_dataset`.")
    if least is not None:
        having, common = rows_having(kept, [rows for _, rows in named("forget", forget)])
        forget = _each(forget, partial(with_own_words, having=having, common=common, least=least))
    if "forget" in starts:
        forget = _each(forget, partial(with_shared_starts, retain=kept))
    return forget, _each(retain, with_repeated_starts) if "retain" in starts else retain


def named(role: str, dataset: Any) -> Iterator[tuple[str, Tokenized]]:
    """The dataset of a role, or those of its topics, with their names."""
    if isinstance(dataset, Mapping):
        yield from ((f"{role} ({topic})", rows) for topic, rows in dataset.items())
    elif dataset is not None:
        yield role, dataset


def _each(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """The changed dataset of a role, or those of its topics."""
    return {name: change(rows) for name, rows in dataset.items()} if isinstance(dataset, Mapping) else change(dataset)
