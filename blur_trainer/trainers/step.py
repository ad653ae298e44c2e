"""The optimizer step up to `.grad`: one pass over the accumulation window per objective, rule, combination."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.rules import Rule
from blur_trainer.objectives.base import Batch
from blur_trainer.trainers.rule_state import inform
from blur_trainer.trainers.step_log import StepLog


class Loss(Protocol):
    """The scalar to descend on one micro-batch of a role: its sum over `count` items, those of all processes."""

    def __call__(self, model: nn.Module, role: str, batch: Batch, count: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads.

    `window`: the micro-batches, each `{"forget": batch, "retain": batch}`. `counts`: per role, in order, the items that
    all processes have in their windows, the divisor of its loss. `loss`: goes through the trainer's `compute_loss`.
    `rule`: answers the rule of this window's topic. `forget_pass`: makes the forget gradient, `None`: by one pass.
    `autocast`: makes the context of a forward pass. `epoch`: those that were finished before this step. `strength`: a
    factor of the forget objective.
    """

    number: int
    epoch: float
    window: list[dict[str, Any]]
    counts: Mapping[str, Tensor]
    loss: Loss
    rule: Callable[[], Rule]
    forget_pass: Callable[["Step", str], Tensor] | None
    backend: GradientBackend
    accelerator: Accelerator
    autocast: Callable[[], AbstractContextManager[Any]]
    log: StepLog
    strength: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def two_slot_step(step: Step) -> Tensor:
    """Each pass's gradient goes into its slot, then both are combined. Returns the loss to log."""
    losses, backend = {}, step.backend
    for role in step.counts:
        make = step.forget_pass if role == "forget" and step.forget_pass else objective_pass
        losses[role] = make(step, role)
        backend.take(role)
    gramian = backend.gramian()
    rule = step.rule()
    weights = weights_of(step, rule, gramian)
    finite = bool(gramian.isfinite().all() and _norm_bound(gramian, weights).isfinite())
    # A loss scaler skips the step itself and lowers its scale. So it must see NaN, even if only the norm is inf.
    if finite or backend.skips_overflow:
        backend.write(weights if finite else weights * torch.nan)
    else:
        backend.discard()
    return record(step, rule, losses, gramian, weights, finite)


def weights_of(step: Step, rule: Rule, gramian: Tensor) -> Tensor:
    """The rule's weights, as if the forget objective were `strength` times what it is."""
    if step.strength == 1.0:
        return rule(gramian)
    scale = torch.ones(len(gramian), dtype=gramian.dtype, device=gramian.device)
    scale[0] = step.strength
    return scale * rule(scale[:, None] * gramian * scale)


def _norm_bound(gramian: Tensor, weights: Tensor) -> Tensor:
    """Squared bound on the combination's norm, in float32: not finite where the combination, or clipping it, is not."""
    return (weights.abs() * gramian.diagonal().clamp(min=0).sqrt()).sum().square().float()


def objective_pass(step: Step, role: str, weight: float = 1.0) -> Tensor:
    """One objective over the window: its loss (this process's share). The engine gets `weight` times its gradient."""
    total = torch.zeros((), device=step.device)
    for index, batch in enumerate(step.window):
        with step.backend.accumulate(last=index == len(step.window) - 1):
            with step.autocast():
                loss = step.loss(step.backend.model, role, batch[role], step.counts[role])
                # `counts` are of all processes, and DDP averages over them: undo the average
                loss = loss * step.accelerator.num_processes
            step.backend.backward(loss if weight == 1.0 else loss * weight)
        total += loss.detach()
    return total


def record(
    step: Step, rule: Rule, losses: Mapping[str, Tensor], gramian: Tensor, weights: Tensor, finite: bool
) -> Tensor:
    """Logs what the step was like, or that it is skipped. Returns the loss that Trainer logs: 0 of a skipped step.

    A rule that remembers is told of a step that was made.
    """
    if not finite:
        step.log.record_skip(gramian, step.number)
        return torch.zeros((), device=step.device)
    step.log.record(losses, gramian, weights, rule)
    inform(rule, losses, step.epoch, step.accelerator)
    weighted = [weight * losses[role] for role, weight in zip(losses, weights.tolist(), strict=False)]
    return torch.stack(weighted).sum()
