"""Collects values of each step until the next log: losses, gradient norms, cosine, weights, skipped steps."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from blur_trainer.constants import ROLES

logger = get_logger(__name__)


class StepLog:
    """Keeps 0-d tensors and reads them only when Trainer logs, so that no step waits for the device.

    A step without a finite gradient is skipped and enters no mean. `max_skipped_steps` skips in a row raise an error.
    `steps` and `skipped` count all steps of the training, and those of them that were skipped; `weights` are the last
    finite step's.
    """

    def __init__(self, accelerator: Accelerator, max_skipped_steps: int, check_weights: Callable[[], None]):
        self.accelerator = accelerator
        self.check_weights = check_weights  # raises if the weights are ruined
        self.max_skipped_steps = max_skipped_steps
        self.steps = self.skipped = 0
        self.weights: Tensor | None = None
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._logged = (0, 0)  # `steps` and `skipped` at the last log
        self._skipped_in_a_row = 0
        self._warned_of_zero: set[str] = set()
        self._first = True

    def record(self, losses: Mapping[str, Tensor], gramian: Tensor, weights: Tensor, rule: Any = None) -> None:
        """Records a finite step: `losses` by role, the Gramian and the weights in the same order, the rule's state.

        An entry of the Gramian is NaN if the step did not compute it (`trainers.single_buffer`).
        """
        self.steps += 1
        self.weights = weights
        self._skipped_in_a_row = 0
        norms = gramian.diagonal().sqrt()
        for index, role in enumerate(losses):
            self._values[f"loss/{role}"].append(losses[role])
            self._values[f"grad/weight_{role}"].append(weights[index])
            if not norms[index].isnan():
                self._values[f"grad/{role}_norm"].append(norms[index])
        if len(weights) > len(ROLES):
            self._values["grad/weight_retain_mean"].append(weights[-1])
        for name, value in rule.state_dict().items() if hasattr(rule, "reset") else ():
            if torch.as_tensor(value).numel() == 1:
                self._values[f"rule/{name}"].append(torch.as_tensor(value).detach().clone().reshape(()))
        if len(losses) == 2 and not norms.isnan().any():
            product = norms[:2].prod()
            self._values["grad/cosine"].append(gramian[0, 1] / product if product > 0 else torch.zeros(()))
        first, self._first = self._first, False
        for index, (role, norm) in enumerate(zip(losses, norms, strict=False)):
            # a zero retain gradient is normal at the first step: the distance to the frozen model is 0
            if norm == 0 and not first and role not in self._warned_of_zero:
                self._warned_of_zero.add(role)
                acts = len(losses) == 2 and bool(weights[1 - index])  # MGDA gives a zero gradient all the weight
                rest = "only the other one acts" if acts else "and no other one has a weight: nothing is changed"
                logger.warning(f"The {role} gradient is exactly 0: its objective is saturated, {rest}.")

    def record_skip(self, gramian: Tensor, step: int) -> None:
        self.check_weights()  # otherwise no later step would have a finite gradient either
        self.steps += 1
        self.skipped += 1
        self._skipped_in_a_row += 1
        norms = "||g_forget|| = {:.3g}, ||g_retain|| = {:.3g}".format(*gramian.diagonal().sqrt().tolist())
        logger.warning(
            f"Step {step} skipped: gradients or rule are not finite ({norms}). The model's weights are unchanged."
        )
        if self._skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row without a finite gradient, the last of them step {step} "
                f"({norms}). The weights are those of the last finite step. Lower `learning_rate`, prefer bf16 to fp16 "
                "or choose a bounded forget objective (`npo` instead of `grad_ascent`)."
            )

    def drain(self, loss: float) -> dict[str, float]:
        """
        Returns what to log: means over the finite steps since the last call.

        `loss` is Trainer's mean over all of these steps, with 0 for a skipped one. It is corrected to the finite steps,
        and is NaN where there is none. The losses by role are summed over the processes, each of which has a share.
        """
        steps, skipped = self.steps - self._logged[0], self.skipped - self._logged[1]
        self._logged = (self.steps, self.skipped)
        means = {"loss": of_finite(loss, steps, skipped)}
        found = {key: torch.stack(values).float().mean() for key, values in self._values.items()}
        for key in found:
            if key.startswith("loss/"):
                found[key] = self.accelerator.reduce(found[key], "mean")
        means |= _read(found)
        if skipped:
            means["grad/skipped"] = float(skipped)
        self._values.clear()
        return means

    def train_loss(self, loss: float) -> float:
        """Trainer's `train_loss`, the mean over all steps, corrected likewise."""
        return of_finite(loss, self.steps, self.skipped)


def _read(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers. The host waits for the device once, not once per number."""
    there = [key for key, number in numbers.items() if not number.is_cpu]
    together = torch.stack([numbers[key] for key in there]).tolist() if there else []
    read = dict(zip(there, together, strict=True))
    return {key: read[key] if key in read else number.item() for key, number in numbers.items()}


def of_finite(mean: float, steps: int, skipped: int) -> float:
    """The mean over the finite steps, from the one over all of them with 0 for a skipped step. NaN if all are."""
    if not skipped:
        return mean
    return mean * steps / (steps - skipped) if steps > skipped else math.nan
