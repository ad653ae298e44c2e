"""Makes DDP, FSDP2 and DeepSpeed launches work with several CPU processes.

Without an accelerator, accelerate counts several CPU processes as one or ignores their engine. This module corrects
that, so that a launch can be tried on a machine without a GPU. On a machine with one, nothing here acts.

accelerate has no setting for it: `ACCELERATE_USE_CPU` gives DDP alone, and sharding is bound to `MULTI_GPU`. So
`join_cpu_processes` sets five attributes of its shared state, after `TrainingArguments` has made the process group, to
what that group says. No other module does; whoever makes an `Accelerator` later in the process finds them so.
"""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from torch import distributed
from transformers import TrainingArguments


def engine_requested(args: TrainingArguments, engine: str) -> bool:
    """Whether `engine` (`fsdp` or `deepspeed`) is requested by the arguments or by `accelerate launch`."""
    launched = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
    return bool(getattr(args, engine)) or launched


def prepare_cpu_engine(args: TrainingArguments) -> None:
    """Prepares the environment before `args` sets up its devices."""
    if not engine_requested(args, "deepspeed"):
        return
    if not is_deepspeed_available():
        raise ImportError("DeepSpeed was asked for and is not installed: pip install 'blur_trainer[deepspeed]'.")
    if args.use_cpu:
        raise ValueError(
            "`use_cpu=True` makes accelerate overlook DeepSpeed: leave it out. Without an accelerator the CPU is used "
            "anyway."
        )
    if not torch.accelerator.is_available():
        from blur_trainer.gradients.deepspeed import communicate_by_gloo

        communicate_by_gloo()


def join_cpu_processes(args: TrainingArguments) -> None:
    """Corrects accelerate's state after `args` has set up its devices."""
    if torch.accelerator.is_available() or not (distributed.is_available() and distributed.is_initialized()):
        return
    state = PartialState()
    state.num_processes = distributed.get_world_size()
    state.process_index = distributed.get_rank()
    state.local_process_index = int(os.environ.get("LOCAL_RANK", 0))
    state.backend = distributed.get_backend()
    if engine_requested(args, "fsdp"):
        state.distributed_type = DistributedType.MULTI_GPU  # `Accelerator` shards only this; the device stays a CPU
    elif state.distributed_type == DistributedType.NO:
        state.distributed_type = DistributedType.MULTI_CPU
