"""Gradient rules: the Gramian of the two gradients in, their two weights out. Order: forget, retain.

`G = [[<g_f,g_f>, <g_f,g_r>], [<g_r,g_f>, <g_r,g_r>]]`, and the optimizer receives `d = w[0] g_f + w[1] g_r`.
A rule is any callable `(2, 2) -> (2,)`. That is the protocol of TorchJD's `Weighting`, so its published rules run here
unchanged. NaN and inf pass through; the caller skips such a step. A rule with `needs_retain_norm = False` promises
never to read `G[1,1]`, which a training with one gradient buffer does not have. Rules that remember something are in
`gradients.stateful_rules`, names in `gradients.by_name`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from blur_trainer.checks import check_fields


class Rule(Protocol):
    """What a rule is: any callable from the `(2, 2)` Gramian of the two gradients to their two weights `(2,)`.

    Order forget, retain; the optimizer receives `w[0] g_f + w[1] g_r`. The Gramian is float64, on the CPU, the same on
    every process. NaN and inf must pass through, then the step is skipped. Published `Weighting`s of TorchJD are rules.
    A rule that never reads `G[1, 1]` says so by `needs_retain_norm = False`: it then runs with one gradient buffer.

    A rule may have more; what it does not have is not asked for:

    | member | what happens |
    |---|---|
    | `update(losses, epoch)` | Called after each step that was made (not skipped), with the losses of both \
objectives, `(2,)` float64 on the CPU, over all processes, and the epochs finished before the step. |
    | `reset()`, `state_dict()`, `load_state_dict(state)` | The state, tensors by name. Checkpoints hold it; a \
training that does not resume begins with `reset()`. |
    | `retain_smoothing: float` | `s`: the trainer keeps `m <- s g_r + (1-s) m` from `m = 0`. The Gramian is `(3, 3)`, \
its third is `m` with this step's gradient; the rule answers three weights. `m` takes a gradient's memory. |
    """

    def __call__(self, gramian: Tensor, /) -> Tensor: ...


FORGET, RETAIN = 0, 1


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, 0 where the denominator is exactly 0 (NaN stays NaN)."""
    zero = denominator == 0
    return torch.where(zero, torch.zeros_like(numerator), numerator / torch.where(zero, 1.0, denominator))


@dataclass(frozen=True)
class Sum:
    """`d = forget_weight g_f + retain_weight g_r`: GradDiff, and the weighted "Pen" form of BLUR's code."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    needs_retain_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, dict.fromkeys(("forget_weight", "retain_weight"), "(-inf, inf)"), owner="Sum")

    def __call__(self, gramian: Tensor) -> Tensor:
        return gramian.new_tensor([self.forget_weight, self.retain_weight])


@dataclass(frozen=True)
class BLUR:
    """Bi-level unlearning, `d = gamma g_l + alpha (g_u - rho g_l)` with `rho = <g_u, g_l> / ||g_l||^2`.

    The upper-level gradient `g_u` loses its component along the lower-level gradient `g_l`. So
    `<d, g_l> = gamma ||g_l||^2` for every `g_u`: to first order the lower objective falls at its own rate.
    `||g_l|| = 0` means `rho = 0`.

    Args:
        lower_level: the objective that is never traded away: `"forget"` (the paper's form) or `"retain"` (its code's
            "forget_upper").
        gamma: rate of the lower level. `alpha=1, gamma=1` is the form of the paper's MUSE and TOFU code.
        alpha: rate of the upper level. `gamma=1, alpha=800` is the form of its WMDP code.
        clamp: keep the weight of `g_l` at 0 or above, as the dynamic-barrier literature does (Gong, Liu and Liu,
            NeurIPS 2021). Off by default, as in the official code.

    Source: arXiv 2506.08164.
    """

    lower_level: Literal["forget", "retain"] = "forget"
    gamma: float = 1.0
    alpha: float = 1.0
    clamp: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {"gamma": "[0, inf)", "alpha": "[0, inf)"}, owner="BLUR")

    @property
    def needs_retain_norm(self) -> bool:
        return self.lower_level == "retain"

    def __call__(self, gramian: Tensor) -> Tensor:
        lower, upper = (FORGET, RETAIN) if self.lower_level == "forget" else (RETAIN, FORGET)
        rho = _ratio(gramian[upper, lower], gramian[lower, lower])
        lower_weight = self.gamma - self.alpha * rho
        if self.clamp:
            lower_weight = lower_weight.clamp(min=0.0)
        upper_weight = torch.full_like(lower_weight, self.alpha)
        pair = (lower_weight, upper_weight) if lower == FORGET else (upper_weight, lower_weight)
        return torch.stack(pair)


@dataclass(frozen=True)
class PCGrad:
    """Projecting conflicting gradients: if `<g_f, g_r> < 0`, each loses its component along the other. Then their sum.

    Source: Yu et al. 2020, arXiv 2001.06782 (with two objectives the order of projections does not matter).
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        conflict = gramian[FORGET, RETAIN].clamp(max=0.0)
        return torch.stack(
            [1.0 - _ratio(conflict, gramian[FORGET, FORGET]), 1.0 - _ratio(conflict, gramian[RETAIN, RETAIN])]
        )


@dataclass(frozen=True)
class MGDA:
    """The shortest vector in the convex hull of both gradients, `min_{0<=a<=1} ||a g_f + (1-a) g_r||`.

    `a = clip((<g_r,g_r> - <g_f,g_r>) / ||g_f - g_r||^2, 0, 1)`, 1/2 where both are equal.
    Source: Sener and Koltun 2018, arXiv 1810.04650, the closed form for two objectives.
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        ff, fr, rr = gramian[FORGET, FORGET], gramian[FORGET, RETAIN], gramian[RETAIN, RETAIN]
        distance = ff + rr - 2.0 * fr
        forget = torch.where(distance == 0, torch.full_like(ff, 0.5), _ratio(rr - fr, distance)).clamp(0.0, 1.0)
        return torch.stack([forget, 1.0 - forget])


@dataclass(frozen=True)
class NGDiff:
    """Both gradients normalized: `d = g_f / ||g_f|| + g_r / ||g_r||`; a gradient of 0 counts as 0.

    The paper's difference of gradients is this sum with [`GradAscent`], whose `g_f` points the other way.
    Source: Bu et al. 2024, arXiv 2410.22086. Differs from the paper, which also fits the learning rate (AutoLR: a
    parabola through three losses, every ten steps); here the learning rate is the scheduler's.
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        norms = gramian.diagonal().clamp(min=0).sqrt()
        return _ratio(torch.ones_like(norms), norms)
