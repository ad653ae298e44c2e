"""Backends for DeepSpeed ZeRO 0 to 3: each process keeps its partition of both gradients; the engine clips and steps.

ZeRO 3 has a documented interface to local gradients. ZeRO 1 and 2 have none, so this file uses private attributes of
DeepSpeed's optimizers (`averaged_gradients`, `all_grad_tensors`, `single_partition_of_fp32_groups`, ...). No other file
does. `gradients.deepspeed_checks` bounds the version, and tests/gradients/test_parity.py checks every stage.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import deepspeed.ops
import torch
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import Tensor, nn

from blur_trainer.constants import ROLES
from blur_trainer.gradients.backend import GradientBackend, Gradients


def communicate_by_gloo() -> None:
    """Lets CPU processes communicate by gloo. DeepSpeed's own shared-memory code would take minutes to compile."""
    ops: Any = deepspeed.ops
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def choose_deepspeed_backend(
    accelerator: Accelerator, engine: Any, offload_forget_gradient: bool = False
) -> "DeepSpeedBackend":
    """Chooses by the exact class of the engine's optimizer: subclasses keep their gradients elsewhere."""
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer:
        kind: type[DeepSpeedBackend] = OffloadedPartitions if optimizer.cpu_offload else Partitions
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        kind = Stage3
    elif type(optimizer) is BF16_Optimizer:
        kind = BF16Masters
    elif isinstance(optimizer, torch.optim.Optimizer) and engine.zero_optimization_stage() == 0:
        kind = DeepSpeedBackend
    else:
        raise NotImplementedError(
            f"DeepSpeed's {type(optimizer).__name__} is not supported: use plain ZeRO 0, 1, 2 or 3."
        )
    return kind(accelerator, engine, offload_forget_gradient)


class DeepSpeedBackend(GradientBackend):
    """ZeRO 0, where `.grad` is whole and equal on all ranks. Also the base of the other stages.

    `Accelerator.backward` would step the engine after the first pass. So this class drives the engine itself: it steps,
    and clips, at the end of `write`.
    """

    def __init__(self, accelerator: Accelerator, engine: Any, offload_forget_gradient: bool = False):
        super().__init__(accelerator, engine, offload_forget_gradient)
        self.engine = engine
        self.optimizer = engine.optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(last)  # must precede the forward pass (its documentation)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def write(self, weights: Tensor) -> None:
        super().write(weights)
        self.engine.step()
        self._empty()  # partitions on a CPU or of ZeRO 3 are still filled after the step

    def discard(self) -> None:
        super().discard()
        if self.engine.lr_scheduler is not None:  # one from the DeepSpeed config advances here
            self.engine.lr_scheduler.step()

    @property
    def skips_overflow(self) -> bool:
        return bool(self.engine.fp16_enabled())

    def _loss_scale(self) -> float:
        return float(self.optimizer.loss_scale) if self.skips_overflow else 1.0


class _Sharded(DeepSpeedBackend):
    sharded = True

    def shared(self, products: Tensor) -> Tensor:
        return self.accelerator.reduce(products.to(self.accelerator.device), "sum").cpu()


class Partitions(_Sharded):
    """ZeRO 1 and 2: the flat partitions of `averaged_gradients`, one list of tensors per parameter group."""

    def _read(self) -> Iterator[Tensor]:
        self._sizes = [[g.numel() for g in self.optimizer.averaged_gradients[i]] for i in self._groups]
        yield from (g.clone() for i in self._groups for g in self.optimizer.averaged_gradients[i])

    def _empty(self) -> None:
        for i in self._groups:
            self.optimizer.averaged_gradients[i] = None
            self.optimizer.all_grad_tensors[i] = None
        self.optimizer.zero_grad()

    def _put(self, gradients: Gradients) -> None:
        tensors = iter(gradients)
        for i, sizes in zip(self._groups, self._sizes, strict=True):
            self.optimizer.averaged_gradients[i] = [next(tensors) for _ in sizes]

    def _weights(self) -> Iterator[Tensor]:
        for i, sizes in zip(self._groups, self._sizes, strict=True):
            yield from _partition(self.optimizer, i).split(sizes)

    def _publish(self) -> None:
        _gather_partitions(self.optimizer)

    def owners(self) -> Iterator[list[tuple[nn.Parameter, slice]]]:
        optimizer = self.optimizer
        for i, sizes in zip(self._groups, self._sizes, strict=True):
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[i])
            starts = optimizer.grad_partition_insertion_offset[i][rank]
            at = {starts[optimizer.get_param_id(p)]: p for p in optimizer.params_in_partition[i]}
            for start in accumulate([0, *sizes[:-1]]):  # none begins where there is padding
                yield [(at[start], slice(None))] if start in at else []

    @property
    def _groups(self) -> range:
        return range(len(self.optimizer.bit16_groups))


def _partition(optimizer: Any, group: int) -> Tensor:
    """This process's flat share of the weights that the model computes with, a view of them."""
    process_group = optimizer.real_dp_process_group[group]
    return optimizer.parallel_partitioned_bit16_groups[group][torch.distributed.get_rank(process_group)]


def _gather_partitions(optimizer: Any) -> None:
    """Gives every process the others' shares, as the optimizer's step does at its end."""
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )


class OffloadedPartitions(_Sharded):
    """ZeRO 1 and 2 with the optimizer on the CPU: its fp32 partitions hold the gradients, in place."""

    def _read(self) -> Iterator[Tensor]:
        get_accelerator().synchronize()  # DeepSpeed fills these by copies that the host does not wait for
        yield from (partition.grad.clone() for partition in self.optimizer.single_partition_of_fp32_groups)

    def _empty(self) -> None:
        for partition in self.optimizer.single_partition_of_fp32_groups:
            partition.grad.zero_()
        self.optimizer.micro_step_id = -1  # else the next backward would add to the accumulated copy on the CPU
        self.optimizer.zero_grad()

    def _put(self, gradients: Gradients) -> None:
        optimizer = self.optimizer
        for i, (partition, gradient) in enumerate(
            zip(optimizer.single_partition_of_fp32_groups, gradients, strict=True)
        ):
            partition.grad.copy_(gradient)
            for parameter in optimizer.params_in_partition[i]:  # clipping uses the norms that backward stored
                key = optimizer.get_param_id(parameter)
                _, _, start, length = optimizer.grad_position[key]
                optimizer.norm_for_param_grads[key] = partition.grad.view(-1).narrow(0, start, length).norm(2)
            optimizer.update_offload_overflow_tracker(partition.grad)

    def owners(self) -> Iterator[list[tuple[nn.Parameter, slice]]]:
        for parameters in self.optimizer.params_in_partition:
            places = [self.optimizer.grad_position[self.optimizer.get_param_id(p)][2:] for p in parameters]
            yield [(p, slice(start, start + size)) for p, (start, size) in zip(parameters, places, strict=True)]

    def _weights(self) -> Iterator[Tensor]:
        yield from (_partition(self.optimizer, i) for i in range(len(self.optimizer.bit16_groups)))

    def _publish(self) -> None:
        _gather_partitions(self.optimizer)


class Stage3(_Sharded):
    """ZeRO 3, also with optimizer or parameters on the CPU. Uses DeepSpeed's documented local gradients.

    These are float32 copies on the device, whatever DeepSpeed itself holds. So each is moved to where its original is
    (the CPU, with the optimizer there) or back to its type, before the next one is read.
    """

    def _read(self) -> Iterator[Tensor]:
        yield from (self._kept(safe_get_local_grad(p)) for p in self.parameters)

    def _kept(self, gradient: Tensor) -> Tensor:
        if self._on_cpu:
            return gradient.to("cpu", copy=True)
        return gradient.to(self.engine.get_data_types()[1], copy=True)  # exact: it comes from this type

    def _empty(self) -> None:
        if len(self.slots) < len(ROLES):  # after both passes `_put` overwrites every partition and `write` empties it
            sizes = [parameter.ds_tensor.numel() for parameter in self.parameters]  # type: ignore[attr-defined]
            zeros = torch.zeros(max(sizes), device="cpu" if self._on_cpu else self.accelerator.device)
            for parameter, size in zip(self.parameters, sizes, strict=True):
                safe_set_local_grad(parameter, zeros.narrow(0, 0, size))
        self.optimizer.zero_grad()

    def _put(self, gradients: Gradients) -> None:
        for index, parameter in enumerate(self.parameters):
            gradient, gradients[index] = gradients[index], None
            safe_set_local_grad(parameter, gradient)

    def _weights(self) -> Iterator[Tensor]:
        self.optimizer._partition_all_parameters()  # small ones stay gathered, and would be computed with
        yield from (parameter.ds_tensor.data for parameter in self.parameters)  # type: ignore[attr-defined]

    @property
    def _on_cpu(self) -> bool:
        return bool(self.optimizer.offload_optimizer)


class BF16Masters(DeepSpeedBackend):
    """ZeRO 1 in bf16 with fp32 accumulation: every rank has the whole reduced gradient, flat per parameter group."""

    def _read(self) -> Iterator[Tensor]:
        yield from (flat.clone() for flat in self.optimizer.fp32_groups_gradients_flat)

    def _empty(self) -> None:
        self.optimizer.zero_grad()

    def _put(self, gradients: Gradients) -> None:
        optimizer = self.optimizer
        for i, (flat, gradient) in enumerate(zip(optimizer.fp32_groups_gradients_flat, gradients, strict=True)):
            flat.copy_(gradient)
            optimizer.fp32_groups_has_gradients[i] = [True] * len(optimizer.bf16_groups[i])

    def owners(self) -> Iterator[list[tuple[nn.Parameter, slice]]]:
        for parameters in self.optimizer.bf16_groups:
            ends = list(accumulate(p.numel() for p in parameters))
            yield [(p, slice(end - p.numel(), end)) for p, end in zip(parameters, ends, strict=True)]

    def _weights(self) -> Iterator[Tensor]:
        yield from self.optimizer.bf16_groups_flat
