"""`KL(p_ref || p)` and `KL(U || p)` per token, from logits, with few copies of them in memory.

Shapes: B batch, T tokens, V vocabulary. Left to autograd, either divergence keeps about five float32 copies of
`(B, T, V)`. Their gradients have a closed form, `p - p_ref` and `p - 1/V`. So only the logits are kept, in their own
dtype, and both passes go through the tokens in slices. What is beyond the logits is the gradient itself, and a slice.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: A pass works on one slice of the tokens at a time: a sixteenth of them. A GPU gets enough work per launch, and a few
#: float32 copies of a slice are less than half a copy of the logits.
SLICES = 16
#: Logits in a slice, at least. Fewer are not worth a launch.
_LEAST = 2**16


def kl_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`KL(p_ref || p)` of each token, `(B, T)`, at least in float32. `ref_logits` get no gradient."""
    return _Divergence.apply(logits, ref_logits.detach())


def uniform_divergence(logits: Tensor) -> Tensor:
    """`KL(U || p)` of each token, `(B, T)`, at least in float32: `logsumexp(z) - mean(z) - log V`."""
    return _Divergence.apply(logits, None)


class _Divergence(torch.autograd.Function):
    """`(B, T, V)` logits, and those of the reference or `None` for a uniform one -> `(B, T)`.

    `backward` uses differentiable operations, so it has derivatives of its own. `jvp` is the forward mode, which
    `single_gradient_buffer` needs.
    """

    @staticmethod
    def forward(logits: Tensor, ref_logits: Tensor | None) -> Tensor:
        values = [_value(z, ref) for _, z, ref in _slices(logits, ref_logits)]
        return torch.cat(values).view(logits.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        logits, ref_logits = ctx.saved_tensors
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows, weights = gradient.view(-1, logits.shape[-1]), weights.reshape(-1, 1)
        for here, z, ref in _slices(logits, ref_logits):
            rows[here] = _slope(z, ref, weights[here])
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, direction: Tensor, _: None) -> Tensor:
        logits, ref_logits = ctx.saved_tensors
        one = torch.ones((), dtype=_precision(logits), device=logits.device)
        along = direction.flatten(0, -2)
        parts = [(_slope(z, ref, one) * along[here]).sum(-1) for here, z, ref in _slices(logits, ref_logits)]
        return torch.cat(parts).view(logits.shape[:-1])


def _slices(logits: Tensor, ref_logits: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Each slice's place among all tokens, its logits `(tokens, V)`, the reference's; both at least in float32."""
    rows, ref_rows = logits.flatten(0, -2), None if ref_logits is None else ref_logits.flatten(0, -2)
    size = max(math.ceil(len(rows) / SLICES), math.ceil(_LEAST / logits.shape[-1]))
    for start in range(0, len(rows), size):
        here = slice(start, start + size)
        ref = None if ref_rows is None else ref_rows[here].to(_precision(logits))
        yield here, rows[here].to(_precision(logits)), ref


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _value(z: Tensor, ref: Tensor | None) -> Tensor:
    if ref is None:
        return z.logsumexp(-1) - z.mean(-1) - math.log(z.shape[-1])
    logp, ref_logp = F.log_softmax(z, dim=-1), F.log_softmax(ref, dim=-1)
    return F.kl_div(logp, ref_logp, log_target=True, reduction="none").sum(-1)


def _slope(z: Tensor, ref: Tensor | None, weight: Tensor) -> Tensor:
    """The derivative by the logits, times `weight`."""
    if ref is None:
        return (z - z.logsumexp(-1, keepdim=True)).exp() * weight - weight / z.shape[-1]
    return (z.softmax(-1) - ref.softmax(-1)) * weight
