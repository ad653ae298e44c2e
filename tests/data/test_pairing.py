"""Pairing: every forget example once per epoch, retain examples evenly, the same pairs whoever asks."""

import collections

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from blur_trainer.data.pairing import PairedDataset, PairedIterableDataset

SIZES = [(1, 1), (1, 7), (7, 1), (5, 5), (5, 3), (3, 5), (12, 4), (4, 12), (20, 13), (13, 20), (6, 100), (100, 6)]


def numbers(n, start=0):
    return list(range(start, start + n))


def pairs(dataset):
    return [(item["forget"], item["retain"]) for item in (dataset[i] for i in range(len(dataset)))]


def identity(items):
    return items


# PairedDataset


def literal_pairs(n_forget, n_retain, seed, epoch):
    """The endless stream, walked from its start."""
    stream, block = [], 0
    while len(stream) < (epoch + 1) * n_forget:
        stream += np.random.default_rng((seed, block)).permutation(n_retain).tolist()
        block += 1
    return [(i, stream[epoch * n_forget + i]) for i in range(n_forget)]


@pytest.mark.parametrize("n_forget, n_retain", SIZES)
@pytest.mark.parametrize("seed", [0, 7])
def test_equals_the_stream_walked_literally(n_forget, n_retain, seed):
    dataset = PairedDataset(numbers(n_forget), numbers(n_retain), seed)
    for epoch in (0, 1, 2, 9, 3, 0):  # any order: nothing is remembered
        dataset.set_epoch(epoch)
        assert pairs(dataset) == literal_pairs(n_forget, n_retain, seed, epoch)


@pytest.mark.parametrize("n_forget, n_retain", SIZES)
def test_forget_once_per_epoch_and_retain_evenly(n_forget, n_retain):
    dataset = PairedDataset(numbers(n_forget), numbers(n_retain), seed=3)
    used = collections.Counter(dict.fromkeys(range(n_retain), 0))
    for epoch in range(6):
        dataset.set_epoch(epoch)
        this = pairs(dataset)
        assert [i for i, _ in this] == numbers(n_forget)
        in_epoch = collections.Counter(dict.fromkeys(range(n_retain), 0))
        for _, j in this:
            used[j] += 1
            in_epoch[j] += 1
            assert max(used.values()) - min(used.values()) <= 1  # after every single item
        # An epoch may end one permutation and begin another, both with the same example.
        assert max(in_epoch.values()) - min(in_epoch.values()) <= (2 if epoch else 1)


def test_a_longer_retain_set_is_covered_by_later_epochs():
    dataset = PairedDataset(numbers(10), numbers(30), seed=1)
    seen = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen.append({j for _, j in pairs(dataset)})
    assert [len(part) for part in seen] == [10, 10, 10] and set.union(*seen) == set(range(30))


def test_a_shorter_retain_set_is_repeated_in_another_order():
    dataset = PairedDataset(numbers(20), numbers(10), seed=1)
    order = [j for _, j in pairs(dataset)]
    assert sorted(order[:10]) == sorted(order[10:]) == numbers(10)
    assert order[:10] != order[10:]


def test_seed_and_epoch_change_the_pairs():
    def drawn(seed, epoch):
        dataset = PairedDataset(numbers(30), numbers(30), seed)
        dataset.set_epoch(epoch)
        return pairs(dataset)

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert drawn(1, 0) != drawn(0, 1)


def test_without_retain_items_hold_forget_only():
    dataset = PairedDataset(numbers(3))
    assert [dataset[i] for i in range(3)] == [{"forget": i} for i in range(3)]


def test_datasets_are_read_by_index():
    forget = Dataset.from_dict({"input_ids": [[1], [2]]})
    dataset = PairedDataset(forget, Dataset.from_dict({"input_ids": [[3]]}))
    assert dataset[1] == {"forget": {"input_ids": [2]}, "retain": {"input_ids": [3]}}


def test_indices_out_of_range_raise():
    dataset = PairedDataset(numbers(3), numbers(2))
    assert list(dataset) == [dataset[i] for i in range(3)]  # the sequence protocol ends on IndexError
    assert dataset[-1] == dataset[2]
    for index in (3, -4):
        with pytest.raises(IndexError, match="3 forget examples"):
            dataset[index]


def test_errors_of_both():
    stream = Dataset.from_dict({"a": [1]}).to_iterable_dataset()
    for args, role in (((stream, [1]), "forget"), (([1], stream), "retain")):
        with pytest.raises(TypeError, match=f"`{role}` dataset is a stream.*PairedIterableDataset"):
            PairedDataset(*args)
    for kind in (PairedDataset, PairedIterableDataset):
        with pytest.raises(TypeError, match="`forget` dataset is a NoneType"):
            kind(None, [1])
        with pytest.raises(TypeError, match="`retain` dataset is a int"):
            kind([1], 5)
        for args, role in ((([], [1]), "forget"), (([1], []), "retain")):
            with pytest.raises(ValueError, match=f"`{role}` dataset is empty"):
                kind(*args)
        for seed in (-1, 0.5, None):
            with pytest.raises(ValueError, match=f"`seed` is {seed}"):
                kind([1], [1], seed=seed)


# PairedDataset behind dataloaders


def loader(dataset, **kwargs):
    return DataLoader(dataset, batch_size=3, collate_fn=identity, **kwargs)


def flat(batches):
    return [(item["forget"], item["retain"]) for batch in batches for item in batch]


@pytest.mark.parametrize(
    "n_forget, n_retain, context",
    [(10, 4, "fork"), (4, 10, "fork"), (7, 7, "fork"), (10, 4, "spawn")],  # a spawned worker imports torch anew: slow
)
def test_workers_that_outlive_an_epoch_see_the_next_one(n_forget, n_retain, context):
    dataset = PairedDataset(numbers(n_forget), numbers(n_retain), seed=2)
    workers = loader(
        dataset,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=context,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(sorted(flat(workers)))
        assert epochs[-1] == literal_pairs(n_forget, n_retain, 2, epoch)
    assert epochs[0] != epochs[1] != epochs[2]


def prepared(dataset, **kwargs):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    return accelerator.prepare(loader(dataset, shuffle=True, **kwargs))


def test_accelerate_sets_the_epoch_and_a_resumed_epoch_gives_the_identical_pairs():
    torch.manual_seed(0)
    dataset = PairedDataset(numbers(11), numbers(30), seed=4)
    batches = prepared(dataset)
    whole = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        whole.append(list(batches))
        assert sorted(flat(whole[-1])) == literal_pairs(11, 30, 4, epoch)
    # A fresh process: same seed, epoch 2, two batches done. accelerate does not reach the dataset any more.
    torch.manual_seed(0)
    again = PairedDataset(numbers(11), numbers(30), seed=4)
    rest = skip_first_batches(prepared(again), 2)
    again.set_epoch(2)
    rest.set_epoch(2)
    assert list(rest) == whole[2][2:]


def test_shards_of_two_processes_are_disjoint_and_complete():
    from accelerate.data_loader import BatchSamplerShard

    dataset = PairedDataset(numbers(12), numbers(5), seed=4)
    dataset.set_epoch(1)
    sampler = loader(dataset).batch_sampler
    shards = [BatchSamplerShard(sampler, num_processes=2, process_index=rank) for rank in (0, 1)]
    parts = [flat(DataLoader(dataset, batch_sampler=shard, collate_fn=identity)) for shard in shards]
    assert sorted(parts[0] + parts[1]) == literal_pairs(12, 5, 4, 1)


# PairedIterableDataset


class Stream(torch.utils.data.IterableDataset):
    """Yields start .. start + n - 1 and remembers the epochs it was told."""

    def __init__(self, n, start=0):
        self.values = numbers(n, start)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.values)


def test_streams_forget_once_retain_again_and_again():
    dataset = PairedIterableDataset(Stream(7), Stream(3, start=100))
    expected = [(i, 100 + i % 3) for i in range(7)]
    assert [(item["forget"], item["retain"]) for item in dataset] == expected
    assert [(item["forget"], item["retain"]) for item in dataset] == expected


def test_a_longer_retain_stream_is_not_read_to_its_end():
    def endless():
        yield from iter(int, 1)

    dataset = PairedIterableDataset(numbers(2), IterableDataset.from_generator(lambda: ({"a": v} for v in endless())))
    assert len(list(dataset)) == 2


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_dataset_with_indices_is_permuted_by_seed_and_epoch(epoch):
    def drawn(forget, retain, seed=0):
        dataset = PairedIterableDataset(forget, retain, seed=seed)
        dataset.set_epoch(epoch)
        return [(item["forget"], item["retain"]) for item in dataset]

    result = drawn(numbers(20), Stream(20))
    assert sorted(i for i, _ in result) == numbers(20) != [i for i, _ in result]
    assert result == drawn(numbers(20), Stream(20)) != drawn(numbers(20), Stream(20), seed=1)
    retain = [j for _, j in drawn(Stream(20), numbers(10))]
    assert sorted(retain[:10]) == sorted(retain[10:]) == numbers(10) and retain[:10] != retain[10:]


def test_epochs_differ_and_are_passed_on():
    forget, retain = Stream(4), Stream(4)
    dataset = PairedIterableDataset(forget, retain)
    dataset.set_epoch(5)
    assert forget.epochs == retain.epochs == [5] and dataset.epoch == 5
    orders = []
    dataset = PairedIterableDataset(numbers(20), Stream(4))
    for epoch in range(3):
        dataset.set_epoch(epoch)
        orders.append(tuple(item["forget"] for item in dataset))
    assert len(set(orders)) == 3


def test_shuffled_streams_of_datasets_get_a_new_order_per_epoch():
    stream = Dataset.from_dict({"a": numbers(50)}).to_iterable_dataset().shuffle(seed=0, buffer_size=50)
    dataset = PairedIterableDataset(stream)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append([item["forget"]["a"] for item in dataset])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == numbers(50)
    assert set(next(iter(dataset))) == {"forget"}


def test_length_is_known_when_forget_has_one():
    assert len(PairedIterableDataset(numbers(3), Stream(2))) == 3
    with pytest.raises(TypeError, match="length is not known"):
        len(PairedIterableDataset(Stream(3), numbers(2)))


@pytest.mark.parametrize("retain", ["stream of 2 shards", "list"])
@pytest.mark.parametrize("forget", ["stream of 2 shards", "list"])
def test_two_persistent_workers_read_forget_once_per_epoch(forget, retain):
    def side(kind, n):
        dataset = Dataset.from_dict({"a": numbers(n)})
        return dataset.to_iterable_dataset(num_shards=2) if kind == "stream of 2 shards" else dataset

    dataset = PairedIterableDataset(side(forget, 10), side(retain, 4), seed=1)
    workers = loader(dataset, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append([(f["a"], r["a"]) for f, r in flat(workers)])
        assert sorted(i for i, _ in epochs[-1]) == numbers(10)
        assert {j for _, j in epochs[-1]} == set(range(4))
    assert (epochs[0] != epochs[1]) is ("list" in (forget, retain))


class EpochStream(Stream):
    """Yields its last known epoch, from a plain attribute that no other process sees."""

    def __iter__(self):
        return iter(self.epochs[-1:] * 3)


def test_a_persistent_worker_passes_the_epoch_on_to_its_own_copies():
    dataset = PairedIterableDataset(EpochStream(3), EpochStream(3))
    worker = loader(dataset, num_workers=1, persistent_workers=True)
    for epoch in (4, 2):
        dataset.set_epoch(epoch)
        assert flat(worker) == [(epoch, epoch)] * 3


@pytest.mark.filterwarnings("ignore:Too many dataloader workers")
def test_a_worker_without_retain_examples_says_so():
    retain = Dataset.from_dict({"a": [1, 2]}).to_iterable_dataset(num_shards=1)
    workers = loader(PairedIterableDataset(numbers(8), retain), num_workers=2)
    with pytest.raises(ValueError, match=r"`retain` dataset gives no example.*lower `dataloader_num_workers`"):
        list(workers)


def test_an_empty_retain_stream_does_not_hang():
    with pytest.raises(ValueError, match="`retain` dataset gives no example"):
        list(PairedIterableDataset(numbers(2), Stream(0)))
