"""Moves the weights along a gradient for a while, and then back, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from blur_trainer.gradients.backend import GradientBackend


@contextmanager
def perturbed(backend: GradientBackend, role: str, scale: float) -> Iterator[None]:
    """Inside, the weights are `w + scale * g`, with the gradient `g` in the slot `role`, which is used up.

    It needs no more memory than the slot: the slot keeps the weights meanwhile. Each process moves its own share, and
    under ZeRO the others get it. The optimizer's float32 copies of 16-bit weights do not move.
    """
    gradients = backend.slots.pop(role)
    with torch.no_grad():
        kept = [_move(w, g, scale) for w, g in zip(backend._weights(), gradients, strict=True)]
        del gradients
        backend._publish()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(backend._weights(), kept, strict=True):
                if weight is not None and old is not None:
                    weight.copy_(old)
            backend._publish()


def _move(weight: Tensor | None, gradient: Tensor | None, scale: float) -> Tensor | None:
    """Changes the weight and returns what it was, in the gradient's memory where the types agree."""
    if weight is None or gradient is None:
        return None
    old = weight.clone()
    weight.add_(gradient.to(weight.device).view_as(weight), alpha=scale)
    if gradient.dtype != weight.dtype:
        return old
    return gradient.copy_(old.view_as(gradient)).view_as(weight)
