"""The trained weights, read bit by bit: whether they have moved, and whether they can still be a model's.

Each process reads its own shards, about as fast as memory allows, before each save and at the end of a training.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: The largest weight may grow by this factor (from at least 1). A weight of 1e4 saturates every layer that reads it; in
#: trained language models the largest are 1 to some hundreds, and a training changes them by less than a half.
GROWTH = 1e4
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HealthCallback(TrainerCallback):
    """Compares the trained weights with those before training."""

    def __init__(self) -> None:
        self.first_step = 0
        #: a training was continued that had taken all its steps
        self.finished = False
        self._start: Tensor | None = None
        self._limit = math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers the weights' bits, as one number per parameter, and how large the largest may become."""
        largest = _largest(kwargs["model"])
        if not math.isfinite(largest):
            raise ValueError("The model's weights are not finite before training: load another copy of it.")
        self._limit, self._start = GROWTH * max(1.0, largest), _bits(kwargs["model"])
        self.first_step, self.finished = state.global_step, state.global_step >= state.max_steps

    def moved(self, model: nn.Module) -> bool:
        """Whether any bit of a trained weight, on any process, is another one than before training."""
        now = _bits(model)
        same = self._start is not None and torch.equal(self._start, now)
        return _over_shards(0.0 if same else 1.0) > 0

    def fault(self, model: nn.Module) -> str | None:
        """What is wrong with the trained weights, or `None`."""
        largest = _largest(model)
        if not math.isfinite(largest):
            return "weights are not finite"
        if largest > self._limit:
            return f"the largest weight is {largest:.3g}, more than {GROWTH:g} times the largest before"
        return None


def _largest(model: nn.Module) -> float:
    """The largest absolute value; NaN counts as infinite."""
    largest = _on_host([torch.stack(torch.aminmax(shard)).abs().max().double() for shard in _shards(model)]).tolist()
    return _over_shards(max((math.inf if math.isnan(value) else value for value in largest), default=0.0))


def _over_shards(value: float) -> float:
    """The maximum over the processes, if each has its own shards. DDP's are equal: there one process may save alone."""
    process = PartialState()
    if process.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return value
    return gather(torch.tensor([value], device=process.device)).max().item()


def local_shard(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that FSDP2 or ZeRO-3 has sharded, else all of it."""
    shard = getattr(parameter, "ds_tensor", parameter).detach()
    return shard.to_local() if isinstance(shard, DTensor) else shard


def _shards(model: nn.Module) -> Iterator[Tensor]:
    """Not empty; floating numbers, as only these are trained."""
    shards = (local_shard(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return (shard for shard in shards if shard.numel())


def _bits(model: nn.Module) -> Tensor:
    """The sum of each shard's bits as integers: exact in any order, so that no change can be lost to rounding."""
    return _on_host([_sum_of_bits(shard.reshape(-1)) for shard in _shards(model)])


def _on_host(numbers: list[Tensor]) -> Tensor:
    """0-d tensors as one on the CPU: the host waits once per device, not once per parameter."""
    if not numbers:
        return torch.zeros(0, dtype=torch.int64)
    device = numbers[-1].device
    return torch.stack([number.to(device, non_blocking=True) for number in numbers]).cpu()


def _sum_of_bits(flat: Tensor) -> Tensor:
    """As int64 modulo 2^64: eight bytes at a time, which is twenty times faster on a CPU, and the rest one by one."""
    size = flat.element_size()
    together = 8 // size
    whole = 0 if flat.storage_offset() % together else flat.numel() // together * together
    rest = flat[whole:].view(_INTEGERS[size]).sum(dtype=torch.int64)
    return rest + flat[:whole].view(torch.int64).sum() if whole else rest
