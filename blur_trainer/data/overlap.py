"""Which tokenized examples are in two datasets."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset


def shared_examples(forget: Dataset, retain: Dataset) -> list[int]:
    """The indices of the forget examples whose tokens a retain example has too, in the same order."""
    kept = set(_digests(retain))
    return [index for index, digest in enumerate(_digests(forget)) if digest in kept]


def _digests(dataset: Dataset) -> Iterator[int]:
    for batch in dataset.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=1000):
        yield from (hash(np.asarray(ids, dtype=np.int64).tobytes()) for ids in batch["input_ids"])
