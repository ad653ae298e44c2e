"""Several forget sets by name: batches alternate between the topics, one topic per optimizer step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from blur_trainer.data.pairing import check_map_style, check_seed, permutation


class TopicDataset(Dataset):
    r"""
    The examples of one epoch in their reading order: step s belongs to topic `s % n`. Read it sequentially.

    A step has `block` examples: those of all processes and of the whole accumulation window. So each step has one
    topic, with one control vector, coefficient and alpha, on all processes.

    The forget examples of topic t are an endless stream of permutations of its forget set; permutation b is drawn from
    (seed, t, b). Its retain examples are drawn the same way, from its own retain set or from the shared one. An item
    depends only on (seed, epoch, position): a resumed run sees the same items.

    Args:
        forget: topic -> map-style dataset, not empty.
        retain: the same topics -> datasets, or one dataset for all, or `None`.
        block (`int`): Examples of one optimizer step.
        seed (`int`, *optional*, defaults to `0`): Of all permutations.
        steps (`int`, *optional*): Optimizer steps of the training. Default: until every topic has been gone through.
        repeat (`bool`, *optional*): Let a topic that is too short begin again, in another order.

    Raises:
        `ValueError`: a topic is too short (and not to be repeated), or the topics do not agree.

    Differs from the WMDP authors' code, which silently stops where the shortest topic ends, and which counts the
    batches of all topics together.
    """

    def __init__(
        self,
        forget: Mapping[str, Any],
        retain: Any | None,
        block: int,
        seed: int = 0,
        steps: int | None = None,
        repeat: bool = False,
    ) -> None:
        check_seed(seed)
        self.topics = tuple(forget)
        self.retain_by_topic = retain if isinstance(retain, Mapping) else dict.fromkeys(self.topics, retain)
        if not self.topics or set(self.retain_by_topic) != set(self.topics):
            raise ValueError(
                f"`retain_dataset` has the topics {sorted(self.retain_by_topic)}, `forget_dataset` {list(self.topics)}:"
                " give one retain dataset for all, or one for each of these."
            )
        self.forget_by_topic = dict(forget)
        for topic in self.topics:
            check_map_style(self.forget_by_topic[topic], f"forget ({topic})")
            if self.retain_by_topic[topic] is not None:
                check_map_style(self.retain_by_topic[topic], f"retain ({topic})")
        self.seed = seed
        self._steps, self._repeat = steps, repeat
        self.resize(block)
        # in shared memory, as in `PairedDataset`: persistent workers must see the new epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def resize(self, block: int) -> None:
        """Chooses the examples of an optimizer step anew: with `auto_find_batch_size` they are found out late."""
        self.block = block
        self.rounds = self._rounds(self._steps, self._repeat)

    def _rounds(self, steps: int | None, repeat: bool) -> int:
        """Steps of each topic in one epoch."""
        sizes = {topic: len(rows) for topic, rows in self.forget_by_topic.items()}
        wanted = -(-max(sizes.values()) // self.block) if steps is None else -(-steps // len(sizes))
        # The last step of an epoch may start a set again. With `steps` given, every step must be complete.
        needed = (wanted - 1) * self.block + 1 if steps is None else wanted * self.block
        short = [topic for topic, size in sizes.items() if size < needed]
        if short and not repeat:
            counts = ", ".join(f"{topic} {size}" for topic, size in sizes.items())
            raise ValueError(
                f"The topic(s) {', '.join(short)} have too few examples ({counts}): {wanted} steps of {self.block} "
                f"examples each are wanted per topic. Set `max_steps` (at most "
                f"{min(sizes.values()) // self.block * len(sizes)} here), give more examples, or set "
                "`repeat_topics=True` to go through short topics again."
            )
        return wanted

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, also in running dataloader workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.rounds * self.block * len(self.topics)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} examples.")
        step, within = divmod(index % len(self), self.block)
        round_, topic = divmod(step, len(self.topics))
        position = (self.epoch * self.rounds + round_) * self.block + within
        name = self.topics[topic]
        roles = [("forget", self.forget_by_topic[name]), ("retain", self.retain_by_topic[name])]
        return {
            role: {**rows[self._drawn(number, topic, len(rows), position)], "topic": topic}
            for number, (role, rows) in enumerate(roles)
            if rows is not None
        }

    def _drawn(self, role: int, topic: int, size: int, position: int) -> int:
        """The row at `position` of the endless stream of permutations of `size` rows."""
        number, offset = divmod(position, size)
        if self._orders.get((role, topic), (-1,))[0] != number:
            self._orders[role, topic] = (number, permutation(size, self.seed, role, topic, number))
        return int(self._orders[role, topic][1][offset])
