"""Which estimates stand beside a measurement on a GPU. docs/benchmarks.md, section "Memory", has the numbers.

Measured on one H100, in one process: full parameters and LoRA, float32, bfloat16 and autocast to bfloat16, AdamW and
SGD, NPO with a copied and a precomputed reference, RMU, checkpointing, the fused head, the forget slot on the CPU,
one gradient buffer. Everything else was counted, or measured on a CPU only: [`unchecked`] names it.
"""

from typing import TYPE_CHECKING

import torch

from blur_trainer.memory.weights import SHARDINGS, Sharding
from blur_trainer.objectives.contrast import FLAT
from blur_trainer.objectives.level import without_level
from blur_trainer.objectives.preference import DPO

if TYPE_CHECKING:
    from blur_trainer.trainers.config import UnlearningConfig

_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "sgd"}


def unchecked(
    args: "UnlearningConfig", sharding: Sharding, processes: int, optim: str, bits: int | None, compute: torch.dtype
) -> tuple[str, ...]:
    """What of this training was never measured on a GPU, in words."""
    objectives = {"forget": without_level(args.build_forget_objective()), "retain": args.build_retain_objective()}
    names = {"forget": args.forget_objective, "retain": args.retain_objective}
    found = {
        f"{processes} processes": processes > 1,
        "the engine's sharding": sharding != SHARDINGS["none"],
        f"{bits}-bit weights": bits is not None,
        f"the state of {optim}": optim not in _OPTIMIZERS,
        "accumulation": args.gradient_accumulation_steps > 1,
        "float16": compute == torch.float16,
        "DPO": isinstance(objectives["forget"], DPO),
        "the pass that reads the level": args.forget_level is not None and args.forget_objective != "target_loss",
        "SAM": args.sam_rho is not None,
        "the mean of retain gradients": hasattr(args.build_rule(), "retain_smoothing"),
        "FLAT": isinstance(objectives["forget"], FLAT),
        # `kl` was measured before it had a closed form
        **{f"the memory of `{name}`": objectives[role].needs_logits for role, name in names.items()},
    }
    return tuple(what for what, applies in found.items() if applies)
