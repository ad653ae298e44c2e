"""Memory between steps: weights, gradients and optimizer state, divided among the GPUs as the engine divides them.

Sources: ZeRO's stages, Rajbhandari et al. 2020, arXiv 1910.02054, section 5; 8-bit states with one float32 per block of
256, Dettmers et al. 2022, arXiv 2110.02861; NF4 with one float32 per block of 64, Dettmers et al. 2023, arXiv
2305.14314; Adafactor's row and column sums, Shazeer and Stern 2018, arXiv 1804.04235.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from blur_trainer.memory.meta import layers
from blur_trainer.models.forward import causal_lm


def _adam(shape: torch.Size, itemsize: int) -> float:
    return 2 * itemsize * prod(shape)


def _adam_8bit(shape: torch.Size, itemsize: int) -> float:
    """bitsandbytes keeps tensors below 4096 elements in float32."""
    return 2 * prod(shape) * (4 if prod(shape) < 4096 else 1 + 4 / 256)


def _adafactor(shape: torch.Size, itemsize: int) -> float:
    return 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] if len(shape) > 1 else prod(shape))


def _nothing(shape: torch.Size, itemsize: int) -> float:
    """No bytes: SGD without momentum, or a paged optimizer, whose state moves to the CPU's memory if needed."""
    return 0


#: name in `TrainingArguments.optim` -> bytes of optimizer state per parameter tensor
OPTIMIZERS: dict[str, Callable[[torch.Size, int], float]] = {
    "adamw_torch": _adam,
    "adamw_torch_fused": _adam,
    "adamw_8bit": _adam_8bit,
    "adamw_bnb_8bit": _adam_8bit,
    "paged_adamw": _nothing,
    "paged_adamw_32bit": _nothing,
    "paged_adamw_8bit": _nothing,
    "adafactor": _adafactor,
    "sgd": _nothing,
}


@dataclass(frozen=True)
class Sharding:
    """Which tensors an engine divides among its processes, and which it keeps in the CPU's memory."""

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False
    #: the engine keeps a float32 copy of the trainable weights, which the optimizer updates
    master: bool = False
    #: optimizer state and finished gradients
    offload_optimizer: bool = False
    offload_parameters: bool = False
    #: the engine casts the weights; otherwise autocast does, in every layer
    casts: bool = False
    #: the engine keeps a copy of the gradients beside the slots, all the time: DDP's buckets, ZeRO 3's partitions
    buckets: bool = False
    #: a slot is copied from the engine's gradients, which are freed after that
    copies: bool = False
    #: gradients are summed up, and kept, in float32
    float32_gradients: bool = False


SHARDINGS = {
    "none": Sharding(buckets=True),
    "zero0": Sharding(master=True, casts=True),
    "zero1": Sharding(optimizer=True, master=True, casts=True, copies=True),
    "zero2": Sharding(gradients=True, optimizer=True, master=True, casts=True, copies=True),
    "zero3": Sharding(parameters=True, gradients=True, optimizer=True, master=True, casts=True, buckets=True),
    "fsdp": Sharding(parameters=True, gradients=True, optimizer=True, casts=True),
}


def sharding_of(args: Any, name: str | None) -> Sharding:
    """The sharding of this name; without a name that of `args` (DeepSpeed's configuration, FSDP, or none)."""
    if name is not None:
        stage, offload = name.removesuffix("_offload"), name.endswith("_offload")
        if stage not in SHARDINGS or (offload and stage not in ("zero1", "zero2", "zero3")):
            raise ValueError(
                f"Unknown sharding {name!r}; accepted: {', '.join(SHARDINGS)}, zero1 to zero3 also with `_offload`."
            )
        return _offloaded(SHARDINGS[stage], optimizer=offload, parameters=offload)
    engine = getattr(args, "hf_deepspeed_config", None)
    if engine is None:
        return SHARDINGS["fsdp" if getattr(args, "fsdp", None) else "none"]
    zero = engine.config.get("zero_optimization", {})
    devices = {part: zero.get(f"offload_{part}", {}).get("device", "none") for part in ("optimizer", "param")}
    sharding = SHARDINGS[f"zero{zero.get('stage', 0)}"]
    if engine.config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        sharding = replace(sharding, float32_gradients=True)
    return _offloaded(sharding, optimizer=devices["optimizer"] != "none", parameters=devices["param"] != "none")


def _offloaded(sharding: Sharding, optimizer: bool, parameters: bool) -> Sharding:
    """Only stage 3 offloads parameters."""
    return replace(sharding, offload_optimizer=optimizer, offload_parameters=parameters and sharding.parameters)


@dataclass(frozen=True)
class Held:
    """Bytes per GPU between the phases of a step, and of the largest tensors that a phase works on."""

    parameters: int
    #: one copy, as the engine hands it out
    gradients: int
    #: the engine's own copy
    buckets: int
    #: a slot holds one part of so many of the gradients
    divided: int
    #: the engine's gradients, while the second slot is copied from them
    taken: int
    optimizer: int
    #: bytes of the largest parameter in float32
    largest: int


def held(
    model: nn.Module, sharding: Sharding, processes: int, optim: str, bits: int | None, gathered: torch.dtype
) -> Held:
    """[`Held`] for a model on the meta device. `gathered`: the dtype in which shards are gathered."""
    if optim not in OPTIMIZERS:
        raise ValueError(f"The state of optim={optim!r} is not known; accepted: {', '.join(OPTIMIZERS)}.")
    quantized = {id(m.weight) for m in linears(model)} if bits else set()
    share = {part: processes if getattr(sharding, part) else 1 for part in ("parameters", "optimizer")}
    parameters = sum(weight_bytes(p, bits if id(p) in quantized else None) for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(OPTIMIZERS[optim](p.shape, 4 if sharding.master else p.element_size()) for p in trained)
    master = sum(4 * p.numel() for p in trained) if sharding.master else 0
    live = 0
    if sharding.parameters and processes > 1:
        units = [sum(p.numel() for p in unit.parameters()) for unit in layers(model)]
        learning = [sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in layers(model)]
        outside = sum(p.numel() for p in model.parameters()) - sum(units)
        # gathered at once: embedding, head, the current layer, its gradient, and the prefetched next layer
        live = gathered.itemsize * (outside + 2 * max(units, default=0) + max(learning, default=0))
    gradients = gradient_bytes(trained, sharding, processes)
    # ZeRO 1 reduces whole gradients, and its optimizer reads a part; with float32 sums it keeps them whole
    divided = 1 if sharding.gradients or not sharding.optimizer or sharding.float32_gradients else processes
    return Held(
        parameters=round((0 if sharding.offload_parameters else parameters / share["parameters"]) + live),
        gradients=gradients,
        buckets=gradients if sharding.buckets and (processes > 1 or sharding.master) else 0,
        divided=divided,
        taken=round(gradients / divided) if sharding.copies else 0,
        optimizer=0 if sharding.offload_optimizer else round((state + master) / share["optimizer"]),
        largest=max((4 * p.numel() for p in trained), default=0),
    )


def gradient_bytes(parameters: Iterable[nn.Parameter], sharding: Sharding, processes: int) -> int:
    """Bytes of one copy of the parameters' gradients, as the engine hands it out: in the parameters' dtype.

    ZeRO 3 hands out float32, tensor by tensor; the backend casts each back before the next one comes.
    """
    if sharding.offload_optimizer:
        return 0
    whole = sum(p.numel() * (4 if sharding.float32_gradients else p.element_size()) for p in parameters)
    return round(whole / (processes if sharding.gradients else 1))


def mask_bytes(model: nn.Module, kept: Held, sharding: Sharding, processes: int) -> int:
    """One byte per entry of a slot, where the slot is."""
    if sharding.offload_optimizer:
        return 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return round(trained / kept.divided / (processes if sharding.gradients else 1))


def linears(model: nn.Module) -> Iterable[nn.Linear]:
    """The layers that bitsandbytes quantizes: all linear layers but the head and adapters."""
    head = causal_lm(model).get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name:
            yield module


def weight_bytes(parameter: nn.Parameter, bits: int | None) -> float:
    if bits == 4:
        return parameter.numel() * (0.5 + 4 / 64)
    if bits == 8:
        return parameter.numel() + 4 * parameter.shape[0]
    return parameter.numel() * parameter.element_size()
