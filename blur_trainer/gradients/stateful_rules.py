"""Rules that remember: a mean of retain gradients (GRU), or the multiplier of a constraint (Constrained, PDU)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blur_trainer.checks import check_fields
from blur_trainer.gradients.rules import FORGET, RETAIN, Rule, Sum, _ratio

_MEAN = 2  # the third row of the Gramian


@dataclass(frozen=True)
class GRU:
    """Gradient rectified unlearning: `g_f` loses what it has against `m`, the exponential mean of retain gradients.

    `d = g_f - min(0, <g_f, m>) / ||m||^2 m + retain_weight g_r`, `m <- s g_r + (1 - s) m` from `m = 0`, this step's
    gradient included. The mean takes the memory of one more gradient.

    Args:
        smoothing: `s`, the share of the newest gradient. At 1 the projection is that of `g_f` in PCGrad.
        retain_weight: 0 in the paper: retaining only says where forgetting may not go.

    Source: Wang et al. 2025, arXiv 2503.09117, as in open-unlearning's `gru.py` (`gamma_gru`). Differs from that code,
    which copies all gradients to the CPU and loses the micro-batches that do not end an accumulation window.
    """

    smoothing: float = 0.8
    retain_weight: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, {"smoothing": "(0, 1]", "retain_weight": "(-inf, inf)"}, owner="GRU")

    @property
    def retain_smoothing(self) -> float:
        return self.smoothing

    def __call__(self, gramian: Tensor) -> Tensor:
        conflict = gramian[FORGET, _MEAN].clamp(max=0.0)
        away = -_ratio(conflict, gramian[_MEAN, _MEAN])
        return torch.stack([torch.ones_like(away), torch.full_like(away, self.retain_weight), away])


@dataclass(frozen=True)
class Constrained:
    """Any rule under the constraint `retain loss <= epsilon`, by a multiplier `lambda` of the retain loss.

    The rule sees `lambda L_retain` as the retain objective, so `lambda g_r` as its gradient. After each step
    `lambda <- max(0, lambda + rate (L_retain - epsilon))`: it grows while the constraint is broken.

    Args:
        rule: without a state of its own. `Sum()` is primal-dual descent on `L_forget + lambda (L_retain - epsilon)`.
        epsilon: bound of the retain loss, as it is logged (nats per token with `NLL`).
        initial: `lambda` of the first step.
        rate: step of `lambda`, per nat.
        warmup_epochs: epochs in which `lambda` does not move.

    Source: Entesari et al. 2025, arXiv 2506.05314. Differs from open-unlearning's `pdu.py`, which moves `lambda` after
    each micro-batch by the loss of one process; here after each optimizer step, by that of the whole window on all
    processes. With accumulation over `n` micro-batches its `dual_step_size` is about `n` times as fast.
    """

    rule: Rule = field(default_factory=Sum)
    epsilon: float = 0.0
    initial: float = 1.0
    rate: float = 1.0
    warmup_epochs: float = 0.0
    _state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        ranges = dict.fromkeys(("initial", "rate", "warmup_epochs"), "[0, inf)")
        check_fields(self, {"epsilon": "(-inf, inf)"} | ranges, owner=name, skipped=("rule", "_state"))
        if not callable(self.rule) or isinstance(self.rule, type):
            raise TypeError(f"{name}: `rule` must be a rule such as `Sum()` or `BLUR(gamma=0.2)`, got {self.rule!r}.")
        if any(hasattr(self.rule, member) for member in ("update", "state_dict", "retain_smoothing")):
            raise ValueError(f"{name}: `rule` must have no state of its own, got {self.rule!r}: take `Sum()`.")
        self.reset()

    def reset(self) -> None:
        self._state["multiplier"] = torch.tensor(float(self.initial), dtype=torch.float64)

    @property
    def needs_retain_norm(self) -> bool:
        return getattr(self.rule, "needs_retain_norm", True)

    @property
    def multiplier(self) -> float:
        """`lambda`."""
        return float(self._state["multiplier"])

    def __call__(self, gramian: Tensor) -> Tensor:
        scale = torch.ones(2, dtype=gramian.dtype, device=gramian.device)
        scale[RETAIN] = self.multiplier
        return scale * self.rule(scale[:, None] * gramian * scale)

    def update(self, losses: Tensor, epoch: float) -> None:
        if epoch >= self.warmup_epochs:
            moved = self._state["multiplier"] + self.rate * (losses[RETAIN] - self.epsilon)
            self._state["multiplier"] = moved.clamp(min=0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state["multiplier"] = torch.as_tensor(state["multiplier"], dtype=torch.float64).clone()


@dataclass(frozen=True)
class PDU(Constrained):
    """Primal-dual unlearning: [`Constrained`] with the settings that its authors published for TOFU.

    Its forget objective is [`Margin`]. The multiplier begins at 100 and stays there for five epochs.
    Source: Entesari et al. 2025, arXiv 2506.05314; settings as in open-unlearning's TOFU script.
    """

    epsilon: float = 0.3
    initial: float = 100.0
    rate: float = 5.0
    warmup_epochs: float = 5.0
