"""How much a small step on one set of examples changes the loss of others, to first order."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.evaluation.batching import buckets
from blur_trainer.gradients.forward_mode import directional_derivative
from blur_trainer.models.forward import answer_logps, evaluating
from blur_trainer.models.logps import answer_mask

Examples = Sequence[Mapping[str, Any]]


def loss_drops(model: nn.Module, step_on: Examples, others: Examples, pad_token_id: int, batch_size: int) -> Tensor:
    r"""
    How fast the loss of each example falls when a sign step is made on another set, $-\mathrm{d}\,l_i(\theta -
    \varepsilon\,\mathrm{sign}(g))/\mathrm{d}\varepsilon$ at $\varepsilon = 0$, that is $\langle\nabla l_i,
    \mathrm{sign}(g)\rangle$.

    $l_i$ is the mean loss of the example's targets, $g$ the gradient of the mean loss of the targets of `step_on`. The
    sign step is Adam's first one. (On a model that knows its data by heart, a step along $g$ itself is mostly along
    what all data share.) Forward-mode differentiation computes the derivative, so that no weight moves.

    Args:
        model: whole, on the device where it is to run. Weights that are not trained do not take part, unless none is.
        step_on, others: `{"input_ids", "labels"}`, each with at least one target.

    Returns:
        `(len(others),)`, float32 on the CPU, nats per token and unit of step.

    Raises:
        `NotImplementedError`: a kernel of the model has no forward mode.
    """
    collate = UnlearningCollator(pad_token_id)
    device = next(model.parameters()).device
    found = torch.zeros(len(others))
    with evaluating(model), _linear_of_torch():
        tangents = _signs(model, list(_batches(step_on, collate, batch_size, device)))
        for indices, batch in _batches(others, collate, batch_size, device):
            found[indices] = directional_derivative(model, tangents, _mean_loss(batch)).float().cpu()
    return found


@contextmanager
def _linear_of_torch() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces `F.linear` in the whole process by a function without forward mode, and leaves it
    there (`zero.Init`, DeepSpeed 0.19). Inside, torch's own is back."""
    present, zero = F.linear, sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    F.linear = getattr(getattr(zero, "InsertPostInitMethodToModuleSubClasses", None), "linear_bk", present)
    try:
        yield
    finally:
        F.linear = present


def _mean_loss(batch: Mapping[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda model: -answer_logps(model, batch) / answer_mask(batch["labels"]).sum(-1)


def _signs(model: nn.Module, batches: Sequence[tuple[list[int], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The sign of the gradient of the summed loss, by the weights' names. `.grad` is not touched."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    frozen = {} if weights else {n: weight for n, weight in model.named_parameters() if weight.is_floating_point()}
    weights |= frozen
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        for weight in frozen.values():
            weight.requires_grad_(True)
        for _, batch in batches:
            with torch.enable_grad():
                loss = -answer_logps(model, batch).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
    finally:
        for weight in frozen.values():
            weight.requires_grad_(False)
    return {name: total.sign_() for name, total in sums.items()}


def _batches(
    examples: Examples, collate: UnlearningCollator, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of examples of similar length, with their indices."""
    for indices in buckets([len(example["input_ids"]) for example in examples], batch_size):
        batch = collate([examples[index] for index in indices])
        yield indices, {name: tensor.to(device) for name, tensor in batch.items()}
