"""What nobody set is chosen by device: bfloat16 autocast, activation checkpointing, the dtype that a model loads in.

| on a device with bfloat16 (a GPU) | on a CPU |
|---|---|
| `bf16=True`: forward passes under autocast | `bf16=False` |
| `activation_checkpointing=True`, but for FSDP, which has a switch of its own | `False` |
| a model given by name: bfloat16 or float32, see below | float32 |

The first two are TRL's defaults. So is float32 for weights that are trained: an update of 1e-5 is less than half of the
last bfloat16 digit of every weight above .004, and AdamW on bfloat16 weights loses it (docs/gpu.md has the numbers).
Weights that stay frozen (below an adapter or an assistant) load in bfloat16. So do those of which the engine keeps
float32 copies (DeepSpeed).
`bf16`, `activation_checkpointing` and `model_init_kwargs={"dtype": ...}` overrule this.
"""

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available

from blur_trainer.models.forward import causal_lm
from blur_trainer.trainers.cpu import engine_requested

logger = get_logger(__name__)
_SAMPLE = 2**16  # weights of each tensor that are looked at

if TYPE_CHECKING:
    _Base = TrainingArguments
else:
    _Base = object


class ByDevice(_Base):
    """Gives `TrainingArguments` the choice by device. Call `choose_by_device` before theirs set up the devices."""

    #: the settings that were left open
    by_device: frozenset[str]

    def choose_by_device(self) -> None:
        left_open = set()
        if self.bf16 is None:
            left_open.add("bf16")
            self.bf16 = has_bfloat16(self.use_cpu) and not _asks_for_another(self)
        # FSDP recomputes by its own setting; transformers' gathers each layer once more
        given = (self.activation_checkpointing, self.gradient_checkpointing)
        if given == (None, None) and not engine_requested(self, "fsdp"):
            left_open.add("activation_checkpointing")
            self.activation_checkpointing = not self.use_cpu and torch.accelerator.is_available()
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch would warn of it
        self.by_device = frozenset(left_open)

    def find_unused_parameters(self) -> None:
        """Lets DDP look for parameters that an objective does not reach, under activation checkpointing too.

        Trainer switches that off there, as it breaks reentrant checkpointing. RMU would then end in DDP's error.
        """
        if self.activation_checkpointing and not is_reentrant(self) and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True


def is_reentrant(args: Any) -> bool:
    """Whether checkpointing is reentrant: torch's default, which transformers changes where it is given no setting."""
    kwargs = dict(args.activation_checkpointing_kwargs or {})
    for own in ("every_n_layers", "offload"):  # transformers' own, which torch does not see
        kwargs.pop(own, None)
    return bool(kwargs) and bool(kwargs.get("use_reentrant", True))


def has_bfloat16(use_cpu: bool) -> bool:
    """Whether the training's device is a GPU (or the like) that computes in bfloat16."""
    return not use_cpu and torch.accelerator.is_available() and bool(is_torch_bf16_gpu_available())


def _asks_for_another(args: TrainingArguments) -> bool:
    """Whether the arguments, `accelerate launch` or DeepSpeed's file name another precision than bfloat16."""
    if args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") in ("fp16", "fp8"):
        return True
    if not engine_requested(args, "deepspeed"):
        return False
    config = args.deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or {}
    if isinstance(config, str | os.PathLike):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False  # DeepSpeed will say what is wrong with it
    enabled = {kind: (config.get(kind) or {}).get("enabled", "auto") for kind in ("fp16", "bf16")}
    without_zero = bool(config) and (config.get("zero_optimization") or {}).get("stage", 0) == 0  # refused in bfloat16
    return enabled["fp16"] is True or enabled["bf16"] is False or without_zero


def on_device(args: Any, device: str) -> Any:
    """The arguments as they would be on a `cpu` or a GPU with bfloat16, where they leave the choice to the device."""
    other = copy.copy(args)
    for name in getattr(args, "by_device", ()):
        setattr(other, name, device != "cpu" and not (name == "bf16" and args.fp16))
    return other


def default_dtype(args: TrainingArguments, frozen: bool, device: str | None = None) -> torch.dtype:
    """
    The dtype of a model given by name, where `model_init_kwargs` names none.

    Args:
        args: says precision and engine.
        frozen: whether the weights stay frozen, below an adapter or an assistant.
        device: of the training; `None`: as `args` say.
    """
    device = args.device.type if device is None else device
    masters = engine_requested(args, "deepspeed")  # its optimizer keeps float32 copies
    return torch.bfloat16 if device != "cpu" and args.bf16 and (frozen or masters) else torch.float32


def loading_arguments(args: Any, frozen: bool) -> dict[str, Any]:
    """What `from_pretrained` gets: `model_init_kwargs`, and a dtype."""
    given: dict[str, Any] = dict(args.model_init_kwargs or {})
    named = {"dtype", "torch_dtype"} & given.keys()
    return given if named else {"dtype": default_dtype(args, frozen)} | given


def settle_checkpointing(model: nn.Module, args: Any) -> None:
    """Switches activation checkpointing off again, if it was chosen here and the architecture has none."""
    if "activation_checkpointing" not in args.by_device or not args.activation_checkpointing:
        return
    target = causal_lm(model)
    if not getattr(target, "supports_gradient_checkpointing", True):
        args.activation_checkpointing = args.gradient_checkpointing = False
        logger.warning(f"`{type(target).__name__}` has no activation checkpointing: all activations are kept.")


def warn_of_rounding(model: nn.Module, args: TrainingArguments) -> None:
    """Says so where most updates of Adam, about as large as the learning rate, are lost in the weights' last digit."""
    if "adam" not in OptimizerNames(args.optim).value or any(
        engine_requested(args, engine) for engine in ("fsdp", "deepspeed")
    ):
        return  # FSDP2 and DeepSpeed keep float32 copies of what is trained
    low = [p.detach() for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    parts = [p.flatten()[:: max(1, p.numel() // _SAMPLE)].abs() for p in low]
    # half a digit of w is at least a quarter of w times eps
    lost = sum(int((part > 4 * args.learning_rate / torch.finfo(part.dtype).eps).sum()) for part in parts)
    share = lost / max(1, sum(part.numel() for part in parts))
    if share > 0.5 and args.learning_rate > 0:
        logger.warning(
            f"The trained weights are {', '.join(sorted({_name(p.dtype) for p in low}))}. For {share:.0%} of them an "
            f"update of `learning_rate`={args.learning_rate:g} is less than half of the last digit, and is lost. Load "
            "the model in float32 (the default for a name; `bf16=True` still computes in bfloat16), or raise the rate."
        )


def describe(model: nn.Module, args: TrainingArguments) -> str:
    """One line for the log: dtypes of the weights, autocast, checkpointing."""
    parts = []
    for what, trained in (("trained", True), ("frozen", False)):
        found = {p.dtype for p in model.parameters() if p.requires_grad is trained and p.dtype.is_floating_point}
        if found:
            parts.append(f"{what} weights {', '.join(sorted(map(_name, found)))}")
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    parts.append(f"forward passes in {autocast} (autocast)" if autocast else "no autocast")
    parts.append(f"activation checkpointing {'on' if args.activation_checkpointing else 'off'}")
    return "Precision: " + "; ".join(parts) + "."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
