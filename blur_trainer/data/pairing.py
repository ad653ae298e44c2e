"""One forget and one retain example per index, drawn from a seed."""

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of `range(size)`, the same for the same key in every process."""
    return np.random.default_rng(key).permutation(size)


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, (datasets.IterableDataset, IterableDataset))


def _check(dataset: Any, role: str) -> None:
    """Raise unless `dataset` is a stream, or has a length above 0 and can be read by index."""
    if _is_stream(dataset):
        return
    if not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
        raise TypeError(
            f"The `{role}` dataset is a {type(dataset).__name__}: it must have a length and be read by index, or be a "
            "`datasets.IterableDataset` or `torch.utils.data.IterableDataset`."
        )
    if len(dataset) == 0:
        raise ValueError(f"The `{role}` dataset is empty: it needs at least one example.")


def check_map_style(dataset: Any, role: str) -> None:
    """Raise unless `dataset` has a length above 0 and can be read by index."""
    _check(dataset, role)
    if _is_stream(dataset):
        raise TypeError(f"The `{role}` dataset is a stream without indices: use `PairedIterableDataset`.")


def check_seed(seed: int) -> None:
    """Raise `ValueError` unless `seed` is an integer >= 0."""
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` is {seed!r}: it must be an integer >= 0.")


class PairedDataset(Dataset):
    r"""
    Pairs each forget example with a retain example: item i is `{"forget": forget[i], "retain": retain[j]}`.

    The retain side is an endless stream of permutations of the retain set. Permutation b is drawn from (seed, b). Item
    i of epoch e takes position \( e \cdot n_f + i \) of the stream. So each forget example appears once per epoch. A
    longer retain set continues in the next epoch; a shorter one is repeated in a new order.

    Counted over the whole training, the uses of two retain examples differ by at most one. Within one later epoch they
    can differ by two, if a permutation ends inside it. The pair depends only on (seed, epoch, i): a resumed run sees
    the same pairs.

    Args:
        forget (map-style dataset): Forget examples, not empty.
        retain (map-style dataset, *optional*): Retain examples, not empty. `None`: items hold `"forget"` only.
        seed (`int`, *optional*, defaults to `0`): Seed of the pairing, >= 0.

    Differs from MUSE, which pairs `forget[i]` with `retain[i % n_r]` in every epoch.
    """

    def __init__(self, forget: Any, retain: Any | None = None, seed: int = 0) -> None:
        for role, dataset in (("forget", forget), ("retain", retain)):
            if dataset is not None or role == "forget":
                check_map_style(dataset, role)
        check_seed(seed)
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self._n_retain = 0 if retain is None else len(retain)
        # In shared memory, because persistent workers hold a copy of this object and must see the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """
        Choose the epoch, also in running dataloader workers.

        accelerate's dataloader calls it at the start of each epoch, but not if its batch sampler is wrapped (several
        processes, or `skip_first_batches` on resume). So a trainer must call it before it iterates.
        """
        self._epoch.fill_(epoch)

    def retain_index(self, index: int) -> int:
        """Index j of the retain example that `index` is paired with in the present epoch."""
        epoch = self.epoch
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        return int(self._order[1][index])

    def _draw(self, epoch: int) -> np.ndarray:
        """Positions e*n_f .. (e+1)*n_f - 1 of the stream of permutations, shape (n_f,)."""
        n_forget, n_retain = len(self.forget), self._n_retain
        block, offset = divmod(epoch * n_forget, n_retain)
        blocks = range(block, block + -(-(offset + n_forget) // n_retain))
        stream = np.concatenate([permutation(n_retain, self.seed, b) for b in blocks])
        return stream[offset : offset + n_forget]

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} forget examples.")
        item = {"forget": self.forget[index]}
        if self.retain is not None:
            item["retain"] = self.retain[self.retain_index(index)]
        return item


class PairedIterableDataset(IterableDataset):
    """
    Pairs where one or both datasets are streams. Forget is read once per epoch, retain as often as needed.

    A stream is read in its own order (`datasets.IterableDataset.shuffle` gives a new one per epoch). A retain stream
    starts again in each epoch. A dataset with indices is permuted by (seed, epoch).

    Several dataloader workers divide the indices of a dataset among them, the forget set's by whole batches of `block`
    examples: then they make as many batches as one would. A `datasets.IterableDataset` divides its
    shards itself; a `torch.utils.data.IterableDataset` must do so too (see its documentation).

    Args:
        forget (dataset or stream): Forget examples.
        retain (dataset or stream, *optional*): Retain examples. `None`: items hold `"forget"` only.
        seed (`int`, *optional*, defaults to `0`): Seed of the pairing, >= 0.
        block (`int`, *optional*, defaults to `1`): Examples in one batch of all processes.
    """

    def __init__(self, forget: Any, retain: Any | None = None, seed: int = 0, block: int = 1) -> None:
        _check(forget, "forget")
        if retain is not None:
            _check(retain, "retain")
        check_seed(seed)
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self.block = block
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch here and in both datasets. Running workers pass it to their copies when they next iterate."""
        self._epoch.fill_(epoch)
        for dataset in (self.forget, self.retain):
            if dataset is not None and hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def __len__(self) -> int:
        if _is_stream(self.forget):
            raise TypeError("The `forget` dataset is a stream: its length is not known.")
        return len(self.forget)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.set_epoch(self.epoch)  # a worker's copies of the datasets get the epoch here
        forget = self._one_pass(self.forget, 0, 0)
        if self.retain is None:
            yield from ({"forget": example} for example in forget)
            return
        for example, other in zip(forget, self._endless_retain(), strict=False):
            yield {"forget": example, "retain": other}

    def _one_pass(self, dataset: Any, role: int, cycle: int) -> Iterator[Any]:
        """Yields this worker's share of `dataset` once. `role` (0 forget, 1 retain) and `cycle` enter the seed."""
        if _is_stream(dataset):
            yield from dataset
            return
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        block = self.block if role == 0 else 1
        for position, index in enumerate(permutation(len(dataset), self.seed, role, self.epoch, cycle)):
            if position // block % workers == first:
                yield dataset[int(index)]

    def _endless_retain(self) -> Iterator[Any]:
        for cycle in itertools.count():
            count = 0
            for example in self._one_pass(self.retain, 1, cycle):
                count += 1
                yield example
            if count == 0:
                raise ValueError(
                    "The `retain` dataset gives no example to this dataloader worker: it is empty, or has fewer "
                    "shards (or examples) than there are workers; lower `dataloader_num_workers`."
                )
