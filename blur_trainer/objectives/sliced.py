"""Values per token from whole logits, with their derivative in closed form, computed in slices of the tokens.

Shapes: B batch, T tokens, V vocabulary. Left to autograd, a divergence keeps about five float32 copies of `(B, T, V)`.
Here only the logits are kept, in their own dtype, and every pass goes through the tokens in slices. What is beyond the
logits is the gradient itself, and a slice.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: A pass works on one slice of the tokens at a time: a sixteenth of them. A GPU gets enough work per launch, and a few
#: float32 copies of a slice are less than half a copy of the logits.
SLICES = 16
#: Logits in a slice, at least. Fewer are not worth a launch.
_LEAST = 2**16


class Formula(NamedTuple):
    """A value per token, and its derivative by the logits. N: the tokens of a slice.

    `value(z, *beside)` returns `(N,)`. `slope(z, weight, *beside)` returns `(N, V)`, the derivative times `weight`
    `(N, 1)`. `z` are the logits `(N, V)`, at least in float32. `beside` are `(N, V)` logits of the same precision, an
    index `(N, 1)`, or numbers. Both must be finite at every token: where one does not count, its weight is 0.
    """

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]


def per_token(formula: Formula, logits: Tensor, *beside: Tensor | float) -> Tensor:
    """`formula` of each token, `(B, T)`, at least in float32.

    `logits` is `(B, T, V)`. `beside` are `(B, T, V)` logits, which get no gradient, an index `(B, T)`, or numbers.
    """
    constant = [each.detach() if isinstance(each, Tensor) else each for each in beside]
    return _PerToken.apply(formula, logits, *constant)


class _PerToken(torch.autograd.Function):
    """`backward` uses differentiable operations, so it has derivatives of its own. `jvp` is the forward mode, which
    `single_gradient_buffer` needs."""

    @staticmethod
    def forward(formula: Formula, logits: Tensor, *beside: Tensor | float) -> Tensor:
        values = [formula.value(z, *others) for _, z, others in _slices(logits, beside)]
        return torch.cat(values).view(logits.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.formula, logits, *beside = inputs
        ctx.numbers = [None if isinstance(each, Tensor) else each for each in beside]
        tensors = [each for each in beside if isinstance(each, Tensor)]
        ctx.save_for_backward(logits, *tensors)
        ctx.save_for_forward(logits, *tensors)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        logits, beside = _saved(ctx)
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows, weights = gradient.view(-1, logits.shape[-1]), weights.reshape(-1, 1)
        for here, z, others in _slices(logits, beside):
            rows[here] = ctx.formula.slope(z, weights[here], *others)
        return None, gradient, *(None for _ in beside)

    @staticmethod
    def jvp(ctx: Any, _: None, direction: Tensor, *__: None) -> Tensor:
        logits, beside = _saved(ctx)
        one = torch.ones((), dtype=_precision(logits), device=logits.device)
        along = direction.flatten(0, -2)
        slopes = ((here, ctx.formula.slope(z, one, *others)) for here, z, others in _slices(logits, beside))
        parts = [(slope * along[here]).sum(-1) for here, slope in slopes]
        return torch.cat(parts).view(logits.shape[:-1])


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor | float]]:
    logits, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    return logits, [next(rest) if number is None else number for number in ctx.numbers]


def _slices(logits: Tensor, beside: Any) -> Iterator[tuple[slice, Tensor, list[Any]]]:
    """Each slice's place among all tokens, its logits `(N, V)`, and what stands beside them."""

    def rows(tensor: Any, here: slice) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        part = tensor.reshape(count, -1)[here]
        return part.to(_precision(logits)) if part.is_floating_point() else part

    count = math.prod(logits.shape[:-1])
    size = max(math.ceil(count / SLICES), math.ceil(_LEAST / logits.shape[-1]))
    for start in range(0, count, size):
        here = slice(start, start + size)
        yield here, rows(logits, here), [rows(each, here) for each in beside]


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
