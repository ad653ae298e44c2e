"""Several datasets for one role: what ULD adds to a set, and retain sets by name, with weights and replayed texts."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets

from blur_trainer.trainers.replay_config import set_weights
from blur_trainer.trainers.topics import is_splits

logger = logging.getLogger(__name__)
Tokenized: TypeAlias = datasets.Dataset | datasets.IterableDataset

REPLAY = "replay"
_OWN = "retain"  # the name of a retain set that was given without one
_AUGMENTED = "augment_retain"  # and of what ULD adds to it


@dataclass(frozen=True)
class Mixture:
    """Several datasets for one role, each in its own format. `balanced`: shorter ones are repeated."""

    parts: tuple[Any, ...]
    balanced: bool = False

    def joined(self, parts: list[Tokenized]) -> Tokenized:
        if any(isinstance(part, datasets.IterableDataset) for part in parts):
            parts = [p.to_iterable_dataset() if isinstance(p, datasets.Dataset) else p for p in parts]
        if self.balanced:
            return datasets.interleave_datasets(parts, stopping_strategy="all_exhausted")
        return datasets.concatenate_datasets(parts)


@dataclass(frozen=True)
class RetainSets:
    """Retain sets by name, each in its own format. `weights`: of each name, or `None`."""

    sets: Mapping[str, Any]
    weights: Mapping[str, float] | None = None

    def joined(self, tokenize: Callable[[Any, str], Tokenized], role: str, says: bool) -> datasets.Dataset:
        """One set of all of them. With weights it has the column `weight`."""
        parts = []
        for name, rows in self.sets.items():
            part = tokenize(rows, role if name == _OWN else f"{role} ({name})")
            if not isinstance(part, datasets.Dataset):
                raise TypeError(
                    f"The retain set {name!r} is a stream: of several sets (or with `retain_set_weights` or `replay`) "
                    "all lengths must be known. Load it."
                )
            part = part.select_columns(["input_ids", "labels"])
            weight = 1.0 if self.weights is None else self.weights[name]
            if says:
                logger.info("The retain set %r has %d examples, weight %g.", name, len(part), weight)
            if self.weights is not None:
                part = part.add_column("weight", [weight] * len(part), feature=datasets.Value("float32"))
            parts.append(part)
        return datasets.concatenate_datasets(parts)


def with_names(retain: Any, replayed: Any, weights: Any, topics: tuple[str, ...]) -> Any:
    """
    The retain set with the names and weights of its parts, and with the replayed texts (or `None`).

    What has one part and no weight stays as it is. `topics`: the names of the forget sets, if there are several; then
    a mapping has a retain set for each of them.
    """
    if retain is None:
        if weights:
            raise ValueError("`retain_set_weights` is set, and there is no `retain_dataset`: pass one.")
        return None
    if topics and isinstance(retain, Mapping):
        return {topic: with_names(rows, replayed, weights, ()) for topic, rows in retain.items()}
    given, *more = retain.parts if isinstance(retain, Mixture) else (retain,)
    sets = own_sets(given)
    if replayed is not None:
        if REPLAY in sets:
            raise ValueError("`retain_dataset` has a set 'replay' already: leave `replay` out, or name the set anew.")
        sets[REPLAY] = replayed
    chosen = set_weights([*sets, *([_AUGMENTED] if more else [])], weights)
    if chosen is None and len(sets) == 1 and next(iter(sets.values())) is given:
        return retain
    named = RetainSets(sets, chosen)
    if not isinstance(retain, Mixture):
        return named
    return Mixture((named, *(RetainSets({_AUGMENTED: part}, chosen) for part in more)), retain.balanced)


def own_sets(given: Any) -> dict[str, Any]:
    """The retain sets of the user's by their names."""
    if not isinstance(given, Mapping) or is_splits(given):
        return {_OWN: given}
    return dict(given)
