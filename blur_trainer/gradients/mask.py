"""Which entries of the weights may change: a gradient is made 0 elsewhere when it is taken.

Everything behind that sees the masked problem: Gramian, rule, clipping, moments. So a training is exactly the
unlearning of these entries, with all others held fixed.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from torch import Tensor

#: the bits of float32's infinity: from 0 to here the order of bits is the order of numbers
_INFINITY = 0x7F800000


class Mask:
    """One process's share of the mask.

    Args:
        frozen: in the places of a gradient: true where an entry may not change. `None`: none in that place may.

    Memory: one byte per entry of the gradients, on their device.
    """

    def __init__(self, frozen: Sequence[Tensor | None]):
        self.frozen = list(frozen)

    def apply(self, gradients: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
        """Goes through the gradients and makes them 0, in place, where an entry may not change."""
        for place, (frozen, gradient) in enumerate(zip_longest(self.frozen, gradients, fillvalue=False)):
            if frozen is False or gradient is False:
                raise ValueError(_OTHER)
            if gradient is None:
                yield None
            elif frozen is None:
                yield gradient.zero_()  # type: ignore[union-attr]
            else:
                yield self._masked(place, frozen, gradient)  # type: ignore[arg-type]

    def _masked(self, place: int, frozen: Tensor, gradient: Tensor) -> Tensor:
        if frozen.shape != gradient.shape:
            raise ValueError(_OTHER)
        if frozen.device != gradient.device:  # read from a checkpoint
            self.frozen[place] = frozen = frozen.to(gradient.device)
        return gradient.masked_fill_(frozen, 0)  # also where it is not finite


_OTHER = (
    "The mask in the checkpoint is of other parameters than the ones trained now: resume with the same model, engine "
    "and number of processes."
)


def threshold(scores: Sequence[Tensor | None], count: int, total: Callable[[int], int]) -> float:
    """
    The largest float32 that at least `count` scores reach, those of all processes. 0 if fewer than `count` are above 0.

    It is found by bisection on the bits of float32, in 31 counts. So it is exact, and no process holds all scores.

    Args:
        scores: this process's, at least 0; `None` counts as 0.
        total: this process's number of something -> that of all processes, the same on each.
    """
    low, high = 0, _INFINITY
    while low < high:
        middle = (low + high + 1) // 2
        limit = _number(middle)
        if total(sum(int((s.float() >= limit).sum()) for s in scores if s is not None)) >= count:
            low = middle
        else:
            high = middle - 1
    return _number(low)


def chosen(scores: Sequence[Tensor | None], limit: float) -> Iterator[Tensor | None]:
    """Goes through the scores: true where one is below `limit`, or 0."""
    for score in scores:
        yield None if score is None else (score.float() < limit) | (score == 0)


def _number(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]
