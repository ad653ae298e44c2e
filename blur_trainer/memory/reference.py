"""Memory of the reference model: the table of `blur_trainer.models.reference` in bytes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peft import PeftModel
from torch import nn

from blur_trainer.memory.weights import Sharding, weight_bytes
from blur_trainer.models.layers import find_layers
from blur_trainer.models.reference import trains_beside_adapter
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers.references import readers_of

if TYPE_CHECKING:
    from blur_trainer.trainers.config import UnlearningConfig

REFERENCES = ("none", "precomputed", "adapter off", "frozen copy")


def reference_bytes(
    args: "UnlearningConfig",
    model: nn.Module,
    objectives: Mapping[str, Objective],
    sharding: Sharding,
    processes: int,
    kind: str | None,
) -> int:
    """Bytes beside `model` (on the meta device). `kind`: one of `REFERENCES`; default: what the trainer chooses."""
    readers, num_layers = readers_of(objectives, args)
    switches = isinstance(model, PeftModel) and not trains_beside_adapter(model)
    chosen = "none" if not readers else "adapter off" if switches else "frozen copy"
    if (kind or chosen) != "frozen copy":
        return 0
    left_out: set[int] = set()
    if num_layers is not None:
        left_out = {id(p) for layer in find_layers(model)[2][num_layers:] for p in layer.parameters()}
        if not sharding.casts:  # engines replace parameters; without one, frozen parameters are shared
            left_out |= {id(p) for p in model.parameters() if not p.requires_grad}
    copied = sum(round(weight_bytes(p, None)) for p in model.parameters() if id(p) not in left_out)
    return copied // (processes if sharding.parameters else 1)
