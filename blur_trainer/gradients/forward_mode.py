"""The derivative of a loss along a direction of the weights, without computing the gradient.

`<d loss / d w, t>` is the derivative of `loss(w + e t)` at `e = 0`. Forward-mode differentiation computes it together
with the loss, in one pass without a graph. Only one layer's activations are in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Along(nn.Module):
    """Wraps `model`; its parameters get `tangents` (by name). A tied parameter has one name and gets one tangent."""

    def __init__(self, model: nn.Module, tangents: Mapping[str, Tensor]):
        super().__init__()
        parameters = dict(model.named_parameters())
        duals = {name: forward_ad.make_dual(parameters[name], tangent) for name, tangent in tangents.items()}
        # Stored outside the module tree. So `has_fused_head` finds no fused LM head, which has no forward mode.
        self.call = partial(functional_call, model, duals)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.call(args, kwargs)


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switches activation checkpointing off: nothing is kept here, and before torch 2.13 it has no forward mode."""
    switched: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def directional_derivative(
    model: nn.Module, tangents: Mapping[str, Tensor], loss: Callable[[nn.Module], Tensor]
) -> Tensor:
    """`sum_name <d loss(model) / d parameter, tangents[name]>`, 0-d. Copies nothing; `.grad` may be the tangents.

    Scaled dot product attention uses its plain formula, the only variant with a forward mode. Other kernels without
    forward mode raise torch's `NotImplementedError`.
    """
    with _without_checkpointing(model), forward_ad.dual_level(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, derivative = forward_ad.unpack_dual(loss(_Along(model, tangents)))
        return torch.zeros_like(value) if derivative is None else derivative
