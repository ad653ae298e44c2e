"""Backends for DeepSpeed ZeRO 0 to 3: each process keeps its partition of both gradients; the engine clips and steps.

ZeRO 3 has a documented interface to local gradients. ZeRO 1 and 2 have none, so this file uses private attributes of
DeepSpeed's optimizers (`averaged_gradients`, `all_grad_tensors`, `single_partition_of_fp32_groups`, ...). No other file
does. The DeepSpeed version is bounded, and tests/gradients/test_parity.py checks every stage.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import deepspeed.ops
import torch
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from packaging.version import Version
from torch import Tensor

from blur_trainer.constants import ROLES
from blur_trainer.gradients.backend import GradientBackend, Gradients

TESTED = (Version("0.19"), Version("0.20"))
#: settings that were never tested with two gradients -> the values that turn them off
_REFUSED: dict[str, tuple[Any, ...]] = {
    "zero_optimization.offload_optimizer.device": (None, "none", "cpu"),
    "zero_optimization.offload_param.device": (None, "none", "cpu"),
    "zero_optimization.offload_optimizer.super_offload": (None, False),
    "zero_optimization.zenflow": (None, False),
    "zero_optimization.zero_hpz_partition_size": (None, 1),
    "zero_optimization.zero_quantized_weights": (None, False),
    "zero_optimization.zero_quantized_gradients": (None, False),
    "zero_optimization.mics_shard_size": (None, -1, 0),
    "torch_autocast.enabled": (None, False),
    "compile.deepcompile": (None, False),
    "hybrid_engine.enabled": (None, False),
    "tensor_parallel.autotp_size": (None, 0, 1),
    "managed_gradient_accumulation": (None, True),
}


def check_deepspeed(config: dict[str, Any]) -> None:
    """Raises if the DeepSpeed version or configuration has no exact backend, or would save no model."""
    installed = Version(version("deepspeed"))
    if not TESTED[0] <= installed < TESTED[1]:
        raise NotImplementedError(
            f"deepspeed {installed} is not supported: its ZeRO optimizers are read through private attributes, tested "
            f"with {TESTED[0]} up to (not including) {TESTED[1]}. Install `deepspeed>={TESTED[0]},<{TESTED[1]}`."
        )
    for key, off in _REFUSED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in off:
            raise NotImplementedError(f"DeepSpeed's `{key}: {value}` is not supported: remove it from the config.")
    gather = "stage3_gather_16bit_weights_on_model_save"
    if _stage(config) == 3 and not config["zero_optimization"].get(gather):
        raise ValueError(
            f"ZeRO-3 without `zero_optimization.{gather}: true` saves no model, only its partitions: set it."
        )
    for kind in ("fp16", "bf16"):
        if _stage(config) == 0 and _is_on(config, kind):
            raise NotImplementedError(
                f"ZeRO 0 with {kind} is not supported (with fp16, DeepSpeed divides gradients by a loss scale that it "
                "never applied): use ZeRO 1 to 3, or DDP without DeepSpeed."
            )


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
    def shared(self, products: Tensor) -> Tensor:
        return self.accelerator.reduce(products.to(self.accelerator.device), "sum").cpu()


class Partitions(_Sharded):
    """ZeRO 1 and 2: the flat partitions of `averaged_gradients`, one list of tensors per parameter group."""

    def _read(self) -> Iterator[Tensor]:
        self._sizes = [len(self.optimizer.averaged_gradients[i]) for i in self._groups]
        yield from (g.clone() for i in self._groups for g in self.optimizer.averaged_gradients[i])

    def _empty(self) -> None:
        for i in self._groups:
            self.optimizer.averaged_gradients[i] = None
            self.optimizer.all_grad_tensors[i] = None
        self.optimizer.zero_grad()

    def _put(self, gradients: Gradients) -> None:
        tensors = iter(gradients)
        for i, size in zip(self._groups, self._sizes, strict=True):
            self.optimizer.averaged_gradients[i] = [next(tensors) for _ in range(size)]

    @property
    def _groups(self) -> range:
        return range(len(self.optimizer.bit16_groups))


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


def _stage(config: dict[str, Any]) -> int:
    return int((config.get("zero_optimization") or {}).get("stage") or 0)


def _is_on(config: dict[str, Any], section: str) -> bool:
    return (config.get(section) or {}).get("enabled") is True
