"""Memory of one objective's pass besides weights and gradients, at the start and at the end of its backward pass.

Backbone: what autograd saves, counted on the meta device (`meta.saved_activations`), up to the objective's last layer.
Head and loss: copies of logits or activations. The constants below were measured (float32 and bfloat16 on a CPU,
`benchmarks/memory.py`); their comments say which tensors they count.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from blur_trainer.memory.meta import Saved, layers, saved_activations
from blur_trainer.memory.weights import linears
from blur_trainer.memory.working import working_bytes
from blur_trainer.models.forward import causal_lm, fused_head_obstacle, hidden_size
from blur_trainer.models.fused_heads import fused_from, logits_bytes
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.contrast import FLAT
from blur_trainer.objectives.level import without_level
from blur_trainer.objectives.preference import DPO
from blur_trainer.objectives.sliced import SLICES
from blur_trainer.trainers.batch_shape import longest_example

if TYPE_CHECKING:
    from blur_trainer.trainers.config import UnlearningConfig

#: float32 copies of `(tokens, vocabulary)` at the peak of `cross_entropy`: the saved log-softmax and two gradients
_CROSS_ENTROPY = 3
#: objectives on distributions, in the dtype of the logits: logits and gradient, and the reference's logits; in float32:
#: copies of one slice of them, the most that one of them makes (`jsd`)
_LOGITS, _REFERENCE_LOGITS, _LOGITS_SLICES = 2, 1, 6
#: float32 copies of `(tokens, hidden)` at the peak of `activation_loss`, during its backward pass: the saved
#: difference, the gradient of its square, and three copies in the derivative of the square
_ACTIVATION_LOSS = 5
#: TRL's fused head: tokens and vocabulary of a tile. Triton works inside the tile; on a CPU torch makes copies of it
_TILE_TOKENS, _TILE_VOCABULARY, _CPU_TILES = 4096, 32768, 8


@dataclass(frozen=True)
class Pass:
    """Bytes of activations when an objective's backward pass begins, and when it ends."""

    begins: int
    ends: int


def batch_tokens(args: "UnlearningConfig", config: Any) -> tuple[int, int]:
    """Examples, and tokens per example, of the longest batch (with topics: of the longest topic)."""
    length = longest_example(args, config)
    if length is None:
        raise ValueError("The model has no longest length: set `max_length`.")
    return args.per_device_train_batch_size, length


def passes(
    args: "UnlearningConfig",
    model: PreTrainedModel | PeftModel,
    objectives: Mapping[str, Objective],
    device: str,
    autocast: torch.dtype | None,
    by_batch: bool = True,
) -> dict[str, Pass]:
    """One [`Pass`] per objective. `model` is on the meta device, in the dtype that it computes in.

    `by_batch`: as for `choose_head`.
    """
    shape = batch_tokens(args, causal_lm(model).config.get_text_config())
    checkpointing = bool(args.activation_checkpointing)
    saved = saved_activations(model, *shape, checkpointing)
    batches = _batches(args, model, math.prod(shape), device, by_batch)
    # if few layers have a graph, the pass through the other layers may need more
    working = 0 if all(saved.inside) else working_bytes(model, *shape)
    found = {}
    for role, given in objectives.items():
        objective = without_level(given)
        part = saved.up_to(objective.top_layer)
        casts = 0 if autocast is None else _autocast_copies(model, part, autocast)
        backbone = _graphs(objective) * part.total(checkpointing)
        layer = part.one_layer() if checkpointing else 0
        begins = max(
            round(tokens / math.prod(shape) * backbone)
            + max(_head(objective, model, tokens, fused, device, autocast is not None), layer)
            for tokens, fused in batches
        )
        begins = max(begins, working + _target(objective, model, shape))
        found[role] = Pass(begins + casts, part.one_layer() + casts)
    return found


def _batches(
    args: "UnlearningConfig", model: PreTrainedModel | PeftModel, tokens: int, device: str, by_batch: bool
) -> list[tuple[int, bool]]:
    """Tokens of the batches that may need most, and whether they take the fused head.

    The longest batch; and, where that takes the fused head and short ones do not, the longest of those.
    """
    vocabulary = causal_lm(model).get_output_embeddings().weight.shape[0]
    size = logits_bytes(tokens, vocabulary)
    least = fused_from(args.fused_lm_head, device == "cuda", size, by_batch)
    if size < least or fused_head_obstacle(model):
        return [(tokens, False)]
    below = math.ceil(least / logits_bytes(1, vocabulary)) - 1
    return [(tokens, True), *([(below, False)] if below > 0 else [])]


def _graphs(objective: Objective) -> int:
    """How many forward passes one backward pass covers. DPO and FLAT have two: refusals and answers."""
    return 2 if isinstance(objective, DPO | FLAT) else 1


def _target(objective: Objective, model: nn.Module, shape: tuple[int, int]) -> int:
    """Bytes of the reference's activations, which are held until the model's are computed."""
    if objective.top_layer is None or not objective.needs_reference:
        return 0
    return shape[0] * shape[1] * hidden_size(model) * causal_lm(model).dtype.itemsize


def _head(objective: Objective, model: nn.Module, tokens: int, fused: bool, device: str, autocast: bool) -> int:
    """Bytes from the last hidden states to the loss and back."""
    if objective.top_layer is not None:
        return 4 * tokens * hidden_size(model) * _ACTIVATION_LOSS
    head = causal_lm(model).get_output_embeddings()
    vocabulary, width = head.weight.shape
    if objective.needs_logits or objective.needs_reference_logits:
        itemsize = 4 if autocast else head.weight.itemsize  # accelerate makes float32 of what autocast computed
        copies = _LOGITS + _REFERENCE_LOGITS * objective.needs_reference_logits
        return int(tokens * vocabulary * (itemsize * copies + 4 * _LOGITS_SLICES / SLICES))
    if not fused:  # each earlier graph keeps its log-softmax
        return logits_bytes(tokens, vocabulary) * (_CROSS_ENTROPY + _graphs(objective) - 1)
    tile = min(tokens, _TILE_TOKENS) * _TILE_VOCABULARY * head.weight.itemsize
    if device == "cpu":  # a small vocabulary leaves pages untouched, and they use no memory
        tile = min(tokens, _TILE_TOKENS) * min(vocabulary, _TILE_VOCABULARY) * 4 * _CPU_TILES
    # gradients are summed in float32, then cast to the model's dtype
    return tile + 4 * tokens * width + (4 * vocabulary * width if head.weight.requires_grad else 0)


def _autocast_copies(model: nn.Module, saved: Saved, compute: torch.dtype) -> int:
    """Bytes of autocast's copies: each `Linear` weight is cast once per pass and kept until its layer's backward."""
    units = [unit for unit, inside in zip(layers(model), saved.inside, strict=False) if inside]
    kept = {id(module) for unit in units for module in unit.modules()}
    return sum(m.weight.numel() * compute.itemsize for m in linears(model) if id(m) in kept)
