"""Weights between two models of one architecture, and the smallest mixture that reaches a level (equal utility)."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

At = Callable[[float], nn.Module]  # strength -> the model at that strength


@contextmanager
def weight_mix(model: nn.Module, before: nn.Module) -> Iterator[At]:
    r"""
    Sets the weights of a whole model between those before and after unlearning, in place.

    $$
    \theta = a\, \theta_{before} + (1 - a)\, \theta_{after}, \qquad a = 1 - \text{strength}
    $$

    Source: 2406.09179, where the mixture makes methods comparable (see [`smallest_mix`]). Computed in float32 (float64
    for float64) and stored in the dtype of `model`. Strength 1 is the model as it was trained, bit for bit, and so is
    the model after the `with` block; strength 0 has the weights of `before`. A strength above 1 goes beyond the trained
    model.

    Only tensors that differ are copied. The copy lies where `before` lies: with `before` on the CPU, a GPU holds the
    model once.

    The two factors of a LoRA must not be mixed one by one: [`strength_dial`] scales their product.

    Args:
        model ([`torch.nn.Module`]): the model after unlearning, not sharded and not in few bits.
        before ([`torch.nn.Module`]): the same architecture before unlearning, on any device.

    Yields:
        `at(strength)`, which sets the weights and returns `model`.

    Raises:
        ValueError: if names or shapes differ, or tensors differ that are no floating-point numbers.

    Example:

    ```python
    with weight_mix(model, target) as at:
        half = evaluation(at(0.5))
    ```
    """
    moved = _moved(model, before)

    @torch.no_grad()
    def at(strength: float) -> nn.Module:
        check_strength(strength)
        for weight, old, new in moved:
            if strength == 1:
                weight.copy_(new)
                continue
            exact = torch.promote_types(torch.float32, weight.dtype)
            weight.copy_(torch.lerp(old.to(weight.device, exact), new.to(weight.device, exact), strength))
        return model

    try:
        yield at
    finally:
        at(1.0)


def check_strength(strength: float) -> None:
    """Raises `ValueError` unless the strength is a finite number."""
    if not math.isfinite(strength):
        raise ValueError(f"strength={strength}: pass a finite number; 0 is the model before, 1 the trained one.")


def _moved(model: nn.Module, before: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each tensor that training changed: itself, its value before, a copy of its value now."""
    ours, theirs = _tensors(model), _tensors(before)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"The two models are not of one architecture: {len(odd)} tensors are in one only, e.g. {odd[0]!r}. Merge "
            "an adapter into its model first, or use `strength_dial`, which scales it."
        )
    moved = []
    for name, weight in ours.items():
        old = theirs[name].detach()
        if weight.shape != old.shape:
            raise ValueError(
                f"{name!r} is {tuple(weight.shape)} in the model and {tuple(old.shape)} before: another size, or a "
                "part only of a sharded model. Mix models that are whole."
            )
        if torch.equal(weight.detach(), old.to(weight.device, weight.dtype)):
            continue
        if not weight.is_floating_point():
            raise ValueError(f"{name!r} ({weight.dtype}) differs and cannot be mixed: load both in 16 or 32 bit.")
        moved.append((weight, old, weight.detach().to(old.device, copy=True)))
    return moved


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


@dataclass(frozen=True)
class Mix:
    """
    What [`smallest_mix`] found.

    Args:
        a: the share of the model before unlearning, in [0, 1]; `None` if no tried mixture reaches the level.
        value: the measure there; `None` where `a` is.
        tried: all `(a, value)` in the order of trying.
    """

    a: float | None
    value: float | None
    tried: tuple[tuple[float, float], ...]


def smallest_mix(measure: Callable[[float], float], level: float, *, grid: int = 5, halvings: int = 4) -> Mix:
    """
    The smallest share `a` of the model before unlearning with `measure(a) >= level`, e.g. a wished model utility.

    Tries `a = 0, 1/(grid-1), ..., 1` up to the first that reaches the level, then halves the distance to the one before
    it: at most `grid + halvings` evaluations. Each try is one, and the rest does not depend on rounding.

    What is returned reaches the level, and a value smaller by `2**-halvings / (grid - 1)` was tried and does not
    (unless `a` is 0). If the measure rises with `a`, it is the smallest one up to that distance. If it does not, no
    smaller one *on the grid* reaches the level; between two points of the grid a smaller one may.

    Args:
        measure (`Callable`): `a -> value`, more is better. NaN does not reach a level.
        level (`float`): the wished value.
        grid (`int`, defaults to `5`): points of the grid, at least 2.
        halvings (`int`, defaults to `4`): steps of bisection after it; 5 and 4 find `a` up to 1/64.

    Raises:
        ValueError: if `grid` is below 2, `halvings` below 0, or the level is not finite.

    Example:

    ```python
    with strength_dial(model, target) as at:
        found = smallest_mix(lambda a: evaluation(at(1 - a))["model_utility"], 0.97 * of_target["model_utility"])
        if found.a is not None:
            still_known = evaluation(at(1 - found.a))
    ```
    """
    if grid < 2 or halvings < 0 or not math.isfinite(level):
        raise ValueError(
            f"grid={grid}, halvings={halvings}, level={level}: pass at least 2 points, at least 0 halvings, and a "
            "finite level."
        )
    tried: list[tuple[float, float]] = []

    def reaches(a: float) -> bool:
        tried.append((a, float(measure(a))))
        return tried[-1][1] >= level

    points = [i / (grid - 1) for i in range(grid)]
    first = next((i for i, a in enumerate(points) if reaches(a)), None)
    if first is None:
        return Mix(None, None, tuple(tried))
    low, high = points[max(first - 1, 0)], points[first]
    for _ in range(halvings if first else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return Mix(high, dict(tried)[high], tuple(tried))
