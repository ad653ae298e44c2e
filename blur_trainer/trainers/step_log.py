"""Collects values of each step until the next log: losses, gradient norms, cosine, weights, skipped steps."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

logger = get_logger(__name__)


class StepLog:
    """Keeps 0-d tensors and reads them only when Trainer logs, so that no step waits for the device.

    A step without a finite gradient is skipped and enters no mean. `max_skipped_steps` skips in a row raise an error.
    """

    def __init__(self, accelerator: Accelerator, max_skipped_steps: int, check_weights: Callable[[], None]):
        self.accelerator = accelerator
        self.check_weights = check_weights  # raises if the weights are ruined
        self.max_skipped_steps = max_skipped_steps
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._skipped = 0
        self._skipped_in_a_row = 0
        self._warned_of_zero: set[str] = set()
        self._first = True

    def record(self, losses: Mapping[str, Tensor], gramian: Tensor, weights: Tensor) -> None:
        """Records a finite step: `losses` by role, the `(2, 2)` Gramian and the `(2,)` weights in the same order.

        An entry of the Gramian is NaN if the step did not compute it (`trainers.single_buffer`).
        """
        self._skipped_in_a_row = 0
        norms = gramian.diagonal().sqrt()
        for index, role in enumerate(losses):
            self._values[f"loss/{role}"].append(losses[role])
            self._values[f"grad/weight_{role}"].append(weights[index])
            if not norms[index].isnan():
                self._values[f"grad/{role}_norm"].append(norms[index])
        if len(losses) == 2 and not norms.isnan().any():
            product = norms.prod()
            self._values["grad/cosine"].append(gramian[0, 1] / product if product > 0 else torch.zeros(()))
        first, self._first = self._first, False
        for role, norm in zip(losses, norms, strict=False):
            # a zero retain gradient is normal at the first step: the distance to the frozen model is 0
            if norm == 0 and not first and role not in self._warned_of_zero:
                self._warned_of_zero.add(role)
                logger.warning(
                    f"The {role} gradient is exactly 0: its objective is saturated, only the other one acts."
                )

    def record_skip(self, gramian: Tensor, step: int) -> None:
        self.check_weights()  # otherwise no later step would have a finite gradient either
        self._skipped += 1
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

    def drain(self) -> dict[str, float]:
        """Returns means since the last call. Losses are also summed over the processes, each of which has a share."""
        means = {}
        for key, values in self._values.items():
            mean = torch.stack([value.float() for value in values]).mean()
            means[key] = (self.accelerator.reduce(mean, "mean") if key.startswith("loss/") else mean).item()
        if self._skipped:
            means["grad/skipped"] = float(self._skipped)
        self._values.clear()
        self._skipped = 0
        return means
