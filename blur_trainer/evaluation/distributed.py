"""Divides batches over the processes and gives every process all results, in the order of the inputs."""

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
    model: nn.Module,
    batches: Sequence[list[int]],
    run: Callable[[list[int]], Sequence[T]],
    desc: str | None,
    alone: bool = False,
) -> list[T]:
    """
    Calls `run(indices)` for every batch and returns one result per index, sorted by index.

    If torch has a process group, its processes take turns, batch by batch, and exchange their results. All of them must
    call this, with the same batches. A batch is never split, so its numbers are those of a single process.

    Args:
        model: the model that `run` uses. If its parameters are sharded, each forward pass needs all processes, so
            processes with one batch less repeat one.
        batches: indices, each in exactly one batch.
        run: results of one batch, in its order; picklable.
        desc: label of the main process's progress bar (for its own share). Default: no bar.
        alone: only this process calls, and runs everything.
    """
    rank, world = (0, 1) if alone else rank_and_world()
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
    """Whether each process holds only a part of the parameters (FSDP2, ZeRO-3). Then a forward pass needs all."""
    # check FSDP2 by its modules: after a forward pass some parameters are gathered and no longer DTensors
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


@contextmanager
def gathering_in_generate(model: nn.Module) -> Iterator[None]:
    """Lets FSDP2 gather the root's parameters in `model.generate` as it does in `forward`.

    A `PeftModel` generates with the inner model. That bypasses its own `forward`, the only method that FSDP2 hooks.
    """
    register = isinstance(model, FSDPModule) and "generate" not in vars(model)  # else its owner has done it
    if register:
        register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        if register:
            del model.generate


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes in torch's group; (0, 1) without a group."""
    # accelerate's `PartialState` would start the process group, or fix the device of later trainers
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _from_all(found: list[Any], world: int) -> list[Any]:
    if world == 1:
        return found
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, found)
    return [item for part in parts for item in part]
