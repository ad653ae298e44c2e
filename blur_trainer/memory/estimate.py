"""What a training will need on each GPU, before any weight is loaded."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.training_args import OptimizerNames

from blur_trainer.memory.activations import Pass, passes
from blur_trainer.memory.checked import unchecked
from blur_trainer.memory.meta import build, load_config
from blur_trainer.memory.reach import reached
from blur_trainer.memory.reference import REFERENCES, reference_bytes
from blur_trainer.memory.weights import Held, gradient_bytes, held, mask_bytes, sharding_of
from blur_trainer.models.forward import causal_lm
from blur_trainer.trainers.loading import unsharded_loading
from blur_trainer.trainers.precision import default_dtype, on_device
from blur_trainer.trainers.trainable import choose_trainable

if TYPE_CHECKING:
    from blur_trainer.trainers.config import UnlearningConfig


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU at the highest point of an optimizer step. `str()` is a table in GiB.

    `overlap` is negative: activations are freed while gradients arrive, so they are never all in memory together.
    `retain_mean` is what the rule `gru` keeps from step to step, `mask` what `mask_share` does.
    `unchecked` names what of this training was counted, but never measured on a GPU.
    """

    parameters: int
    gradients: int
    forget_slot: int
    optimizer: int
    reference: int
    activations: int
    overlap: int
    retain_mean: int = 0
    mask: int = 0
    unchecked: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self._rows().values())

    def _rows(self) -> dict[str, int]:
        absent = {"unchecked"} | {name for name in ("retain_mean", "mask") if getattr(self, name) == 0}
        return {name.replace("_", " "): value for name, value in asdict(self).items() if name not in absent}

    def __str__(self) -> str:
        lines = [
            f"{name:12} {value / 2**30:9.2f} GiB" for name, value in (self._rows() | {"total": self.total}).items()
        ]
        if self.unchecked:
            lines.append(f"not checked on a GPU: {', '.join(self.unchecked)}")
        return "\n".join(lines)


def estimate_memory(
    model: str | PreTrainedConfig | PreTrainedModel | PeftModel,
    args: "UnlearningConfig",
    world_size: int = 1,
    *,
    peft_config: PeftConfig | None = None,
    dtype: str | torch.dtype | None = None,
    bits: Literal[4, 8] | None = None,
    sharding: str | None = None,
    reference: Literal["none", "precomputed", "adapter off", "frozen copy"] | None = None,
    device: Literal["cuda", "cpu"] | None = None,
) -> MemoryEstimate:
    """Memory per GPU of training `model` with `args`. It needs only the model's structure; no weights are loaded.

    Not counted: the CUDA context (about half a GiB), fragmentation, DeepSpeed's communication buckets.

    Args:
        model: a configuration, a model (its frozen parameters count as frozen), or a name or path.
        args: gives batch size, `max_length` (with `topics` the longest), checkpointing, optimizer, objectives,
            `train_layers`, `train_parameters` and engine.
        world_size: processes, one per GPU.
        peft_config: as for the trainer.
        dtype: of the weights. Default: the model's own, else `model_init_kwargs`, else as the trainer loads a name.
        bits: 4 or 8 for a base quantized by bitsandbytes. Default: as the model's configuration says.
        sharding: `none`, `zero0` to `zero3`, `fsdp`, or `zero1_offload` to `zero3_offload`. Offload puts optimizer and
            gradients, under stage 3 also parameters, into the CPU's memory. Default: from `args`.
        reference: `none`, `precomputed`, `adapter off` or `frozen copy`. Default: what the trainer would choose. For
            objectives on activations a copy has the lower layers only. A `ref_model` that you pass is not counted.
        device: `cpu` for a training there, else a GPU with bfloat16, where `args` may leave `bf16` and
            `activation_checkpointing` to the device. Default: from `args.use_cpu`.

    Raises:
        `ValueError`: for whatever the trainer would refuse, e.g. a layer that the model does not have.
    """
    if reference not in (None, *REFERENCES):
        raise ValueError(f"Unknown reference {reference!r}; accepted: {', '.join(REFERENCES)}.")
    _check_numbers(world_size, bits)
    if hasattr(args, "num_assistant_layers"):
        raise NotImplementedError(
            f"`{type(args).__name__}` trains an assistant of the model's lower layers, which is not counted here. Ask "
            "for a model of these layers with LoRA: a configuration with fewer `num_hidden_layers`, and `peft_config`."
        )
    config = load_config(model)
    device = device or ("cpu" if args.use_cpu else "cuda")
    args = on_device(args, device)
    stored = _dtype(model, config, args, dtype, device, frozen=peft_config is not None or bool(bits or _bits(config)))
    engine = sharding_of(args, sharding)
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else stored
    if engine.master:  # DeepSpeed casts the weights themselves, and updates its float32 copy of them
        stored = compute
    objectives = {"forget": args.build_forget_objective(), "retain": args.build_retain_objective()}

    def prepared(dtype: torch.dtype) -> PreTrainedModel | PeftModel:
        with unsharded_loading(args):  # under ZeRO 3 transformers would fill partitions, which needs weights
            built = build(model, config, dtype, peft_config)
        choose_trainable(built, args.train_layers, args.train_parameters, objectives)
        return built

    built = prepared(stored)
    optim, few = OptimizerNames(args.optim).value, bits or _bits(config)
    kept = held(built, engine, world_size, optim, few, compute)
    # DeepSpeed fills in zeros for parameters without a gradient
    gradients = {
        role: kept.gradients if engine.master else gradient_bytes(reached(built, objective), engine, world_size)
        for role, objective in objectives.items()
    }
    copied = reference_bytes(args, built, objectives, engine, world_size, reference)
    autocast = compute if compute != stored and not engine.casts else None
    by_batch = not (engine.parameters or engine.master)  # as `setup.choose_heads`: neither FSDP2 nor DeepSpeed
    runs = passes(args, built if compute == stored else prepared(compute), objectives, device, autocast, by_batch)
    estimate = _highest(args, kept, gradients, runs, copied, device)
    estimate = replace(estimate, mask=0 if args.mask_share is None else mask_bytes(built, kept, engine, world_size))
    doubts = unchecked(args, engine, world_size, optim, few, compute) if device == "cuda" else ()
    return replace(estimate, unchecked=doubts)


def _check_numbers(world_size: int, bits: int | None) -> None:
    if world_size < 1:
        raise ValueError(f"`world_size` is {world_size}: it is the number of processes, at least 1.")
    if bits not in (None, 4, 8):
        raise ValueError(f"`bits` is {bits}: 4 or 8, or None for weights that are not quantized.")


def _highest(
    args: "UnlearningConfig", kept: Held, gradients: dict[str, int], runs: dict[str, Pass], copied: int, device: str
) -> MemoryEstimate:
    """The largest of four phases: both passes, the combination, the optimizer step."""
    single_buffer = args.single_gradient_buffer
    slot = 0 if single_buffer or args.offload_forget_gradient else round(gradients["forget"] / kept.divided)
    accumulates = args.gradient_accumulation_steps > 1

    def height(role: str) -> int:
        combines = single_buffer and role == "retain"  # the gradient is in memory together with the activations
        gradient = kept.gradients if combines else gradients[role]
        begins = runs[role].begins + (gradient if accumulates or combines else 0)
        keeps = role == "retain" or args.sam_rho is not None  # the weights, while SAM has moved them
        return (slot if keeps else 0) + max(begins, runs[role].ends + gradient)

    # on a GPU torch's unfused AdamW copies all gradients; Adafactor makes a few copies of the largest one
    temporary = {"adamw_torch": kept.gradients if device == "cuda" else kept.largest, "adafactor": 4 * kept.largest}
    combination = max(kept.gradients, round(gradients["retain"] / kept.divided) + slot + kept.taken)
    step = kept.gradients + temporary.get(args.optim, 0)
    activations = max(run.begins for run in runs.values())
    mean = round(gradients["retain"] / kept.divided) if hasattr(args.build_rule(), "retain_smoothing") else 0
    highest = max(*(height(role) for role in runs), combination, step)
    return MemoryEstimate(
        parameters=kept.parameters,
        gradients=kept.gradients + kept.buckets,
        forget_slot=slot,
        optimizer=kept.optimizer,
        reference=copied,
        activations=activations,
        overlap=highest - (kept.gradients + slot + activations),
        retain_mean=mean,
    )


def _dtype(
    model: Any, config: PreTrainedConfig, args: "UnlearningConfig", dtype: Any, device: str, frozen: bool
) -> torch.dtype:
    if dtype is None and isinstance(model, nn.Module):
        dtype = causal_lm(model).dtype
    init: Any = args.model_init_kwargs or {}
    dtype = dtype or init.get("dtype") or default_dtype(args, frozen, device)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` must be a floating point dtype such as `bfloat16`, got {dtype!r}.")
    return found


def _bits(config: PreTrainedConfig) -> int | None:
    """4 or 8 if the configuration is that of a checkpoint quantized by bitsandbytes."""
    quantization = getattr(config, "quantization_config", None)
    settings = quantization if isinstance(quantization, dict) else getattr(quantization, "to_dict", dict)()
    return 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None
