"""Every process its share of the batches, every process the whole result, in the order of the inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm.auto import tqdm

T = TypeVar("T")


def in_shares(
    model: nn.Module, batches: Sequence[list[int]], run: Callable[[list[int]], Sequence[T]], desc: str | None
) -> list[T]:
    """
    `run(indices)` of every batch, one result per index, sorted by index.

    Where torch has a process group, its processes take turns, batch by batch, and exchange what they found: all of them
    must call this, with the same batches. A batch is never split, so its numbers are those of a single process.

    Args:
        model: what `run` runs. Are its parameters sharded, a forward pass needs all processes: those that have a batch
            less repeat one.
        batches: indices, each in exactly one batch.
        run: results of one batch, in its order; picklable.
        desc: label of the main process's progress bar (its own share); no bar when left out.
    """
    rank, world = rank_and_world()
    mine = batches[rank::world]
    found: list[tuple[int, T]] = []
    with tqdm(total=sum(map(len, mine)), desc=desc, disable=desc is None or rank > 0) as bar:
        for indices in mine:
            found += zip(indices, run(indices), strict=True)
            bar.update(len(indices))
    if is_sharded(model):
        for _ in range(ceil(len(batches) / world) - len(mine)):
            run(batches[-1])
    return [result for _, result in sorted(_from_all(found, world), key=lambda pair: pair[0])]


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only (FSDP2, ZeRO-3): then a forward pass is a collective."""
    # FSDP2 by its modules: after a forward pass some of its parameters are whole, and no longer DTensors
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


@contextmanager
def gathering_in_generate(model: nn.Module) -> Iterator[None]:
    """Lets FSDP2 gather the root's parameters in `model.generate` as it does in `forward`.

    A `PeftModel` generates with the model inside, past its own `forward`, which alone FSDP2 knows of.
    """
    register = isinstance(model, FSDPModule) and "generate" not in vars(model)  # else its owner has done so
    if register:
        register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        if register:
            del model.generate


def rank_and_world() -> tuple[int, int]:
    """Which process of torch's group this is, and of how many; the only one without a group."""
    # not accelerate's `PartialState`: asking it would start the process group, or fix the device of later trainers
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _from_all(found: list[Any], world: int) -> list[Any]:
    if world == 1:
        return found
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, found)
    return [item for part in parts for item in part]
