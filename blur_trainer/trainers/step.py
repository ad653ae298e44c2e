"""The optimizer step up to `.grad`: one pass over the accumulation window per objective, rule, combination."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.rules import Rule
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers.step_log import StepLog


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads.

    `window`: the micro-batches, each `{"forget": batch, "retain": batch}`. `counts`: per role the items that all
    processes have in their windows, the divisor of its loss. `autocast`: makes the context of a forward pass.
    """

    number: int
    window: list[dict[str, Any]]
    counts: Mapping[str, Tensor]
    objectives: Mapping[str, Objective]
    reference: Reference | None
    rule: Rule
    backend: GradientBackend
    accelerator: Accelerator
    autocast: Callable[[], AbstractContextManager[Any]]
    log: StepLog

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def two_slot_step(step: Step) -> Tensor:
    """Each pass's gradient goes into its slot, then both are combined. Returns the loss to log."""
    losses, backend = {}, step.backend
    for role in step.objectives:
        losses[role] = objective_pass(step, role)
        backend.take(role)
    gramian = backend.gramian()
    weights = step.rule(gramian)
    finite = bool(gramian.isfinite().all() and _norm_bound(gramian, weights).isfinite())
    # A loss scaler skips the step itself and lowers its scale. So it must see NaN, even if only the norm is inf.
    if finite or backend.skips_overflow:
        backend.write(weights if finite else weights * torch.nan)
    else:
        backend.discard()
    return record(step, losses, gramian, weights, finite)


def _norm_bound(gramian: Tensor, weights: Tensor) -> Tensor:
    """Squared bound on the combination's norm, in float32: not finite where the combination, or clipping it, is not."""
    return (weights.abs() * gramian.diagonal().clamp(min=0).sqrt()).sum().square().float()


def objective_pass(step: Step, role: str, weight: float = 1.0) -> Tensor:
    """One objective over the window: its loss (this process's share). The engine gets `weight` times its gradient."""
    total = torch.zeros((), device=step.device)
    for index, batch in enumerate(step.window):
        with step.backend.accumulate(last=index == len(step.window) - 1):
            with step.autocast():
                loss = step.objectives[role](step.backend.model, batch[role], step.reference, step.counts[role])
                # `counts` are of all processes, and DDP averages over them: undo the average
                loss = loss * step.accelerator.num_processes
            step.backend.backward(loss if weight == 1.0 else loss * weight)
        total += loss.detach()
    return total


def record(step: Step, losses: Mapping[str, Tensor], gramian: Tensor, weights: Tensor, finite: bool) -> Tensor:
    """Logs what the step was like, or that it is skipped. Returns the loss that Trainer logs."""
    if not finite:
        step.log.record_skip(gramian, step.number)
        return torch.zeros((), device=step.device)
    step.log.record(losses, gramian, weights)
    weighted = [weight * losses[role] for role, weight in zip(losses, weights.tolist(), strict=False)]
    return torch.stack(weighted).sum()
