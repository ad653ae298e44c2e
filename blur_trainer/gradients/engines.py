"""Chooses the backend for the running engine. Unsupported engines raise: a wrong gradient would go unnoticed."""

from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from blur_trainer.gradients.backend import GradientBackend

if TYPE_CHECKING:
    from transformers import TrainingArguments

_DATA_PARALLEL = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_HPU,
}
_SERVED = "Gradient rules run on one process, DDP, FSDP2 and DeepSpeed ZeRO 0 to 3 (docs/distributed.md)."


def check_engine(accelerator: Accelerator, args: "TrainingArguments") -> None:
    """Raises `NotImplementedError`, naming the setting, if no exact backend exists."""
    if args.parallelism_config is not None or accelerator.parallelism_config is not None:
        raise NotImplementedError(f"`parallelism_config` is not supported. {_SERVED}")
    if args.n_gpu > 1:
        raise NotImplementedError(
            "torch.nn.DataParallel is not supported: start one process per GPU with `accelerate launch`, or make one "
            "GPU visible with CUDA_VISIBLE_DEVICES."
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in ("lomo", "adalomo") or "layerwise" in optimizer:
        raise NotImplementedError(
            f"optim={optimizer!r} updates layers during backward, before both gradients are known: use another one."
        )
    if accelerator.distributed_type in _DATA_PARALLEL:
        if args.ddp_static_graph and args.gradient_accumulation_steps > 1:
            raise NotImplementedError(
                "`ddp_static_graph=True` with gradient accumulation fails inside DDP: unset `ddp_static_graph`."
            )
    elif accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise NotImplementedError(
                "FSDP version 1 is not supported, version 2 is: set `fsdp_version: 2` in the file of `accelerate "
                'launch`, or `fsdp_config={"version": 2, ...}`.'
            )
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            raise NotImplementedError(
                "FSDP2 with CPU offload is not supported (its tests would need a GPU): leave it off, or use ZeRO-3 "
                "with `offload_param` and `offload_optimizer` (ds_configs/zero3_offload.json)."
            )
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        from blur_trainer.gradients.deepspeed_checks import check_deepspeed  # DeepSpeed is an optional dependency

        check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
    else:
        raise NotImplementedError(f"{accelerator.distributed_type.value} is not supported. {_SERVED}")


def choose_backend(
    accelerator: Accelerator, model: nn.Module, args: "TrainingArguments", offload_forget_gradient: bool = False
) -> GradientBackend:
    """The backend of the running engine, around the prepared (wrapped) model."""
    check_engine(accelerator, args)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from blur_trainer.gradients.deepspeed import choose_deepspeed_backend

        return choose_deepspeed_backend(accelerator, model, offload_forget_gradient)
    if accelerator.distributed_type == DistributedType.FSDP:
        from blur_trainer.gradients.fsdp import FSDPBackend

        return FSDPBackend(accelerator, model, offload_forget_gradient)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise NotImplementedError(
            f"The model's parameters are sharded already (tensor parallelism, or at loading). {_SERVED} Load it whole "
            "and let FSDP2 or ZeRO-3 shard it."
        )
    return GradientBackend(accelerator, model, offload_forget_gradient)


def check_unchanged(accelerator: Accelerator, model: nn.Module, changed: list[str], optimizer: Any) -> None:
    """Raises if parameters that were frozen or unfrozen during training cannot be followed."""
    names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    if accelerator.distributed_type != DistributedType.NO:
        raise NotImplementedError(
            f"{names} was frozen or unfrozen during training. Under {accelerator.distributed_type.value} only what was "
            "trainable before the first step is reduced over the processes: choose it before `train()`."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(p.requires_grad and id(p) not in held for name, p in model.named_parameters() if name in changed):
        raise ValueError(
            f"{names} was unfrozen during training, and the optimizer does not hold it: call "
            "`optimizer.add_param_group`, or pass `optimizers` that hold it from the beginning."
        )
