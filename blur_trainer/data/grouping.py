"""Pairs in an order that puts forget examples of like length into one batch: `train_sampling_strategy`."""

from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from blur_trainer.data.pairing import PairedDataset


class GroupedDataset(PairedDataset):
    """
    A [`PairedDataset`] to be read sequentially: its order groups forget examples by length, with some randomness.

    The order depends only on (seed, epoch), so that all processes and a resumed training have the same one. The length
    of the retain examples, which are others in each epoch, does not count.

    Args:
        batch (`int`): Examples that are to be of like length.
    """

    def __init__(self, forget: Any, retain: Any | None, batch: int, seed: int = 0) -> None:
        super().__init__(forget, retain, seed)
        self.batch = batch
        self._lengths = [len(ids) for ids in forget["input_ids"]]
        self._grouped: tuple[int, list[int]] | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(self._positions()[index])

    def _positions(self) -> list[int]:
        epoch = self.epoch
        if self._grouped is None or self._grouped[0] != epoch:
            drawn = int(np.random.default_rng((self.seed, epoch)).integers(2**63))
            generator = torch.Generator().manual_seed(drawn)
            self._grouped = (epoch, get_length_grouped_indices(self._lengths, self.batch, generator=generator))
        return self._grouped[1]
