"""The exponential mean of the retain gradient, which a rule may ask for: `m <- s g_r + (1 - s) m`, from `m = 0`.

It is sharded as the gradients are: each process keeps its share. It is of a gradient's size and type.
"""

import torch
from torch import Tensor

#: a process's share of a gradient, one tensor per parameter (or partition), `None` where there is none
Gradients = list[Tensor | None]


class RetainMean:
    """One process's share of the mean. `smoothing` is `s`, the share of the newest gradient."""

    def __init__(self, smoothing: float):
        self.smoothing = smoothing
        self.gradients: Gradients | None = None

    def gramian(self, pair: Tensor, products: Tensor) -> Tensor:
        """`(3, 3)` of forget, retain and the mean after this step. Reads the mean before it, and changes nothing.

        Args:
            pair: `(2, 2)`, of forget and retain.
            products: `(<g_f, m>, <g_r, m>, <m, m>)` with the mean before this step.
        """
        before = pair.new_zeros(3, 3)
        before[:2, :2] = pair
        before[:2, 2] = before[2, :2] = products[:2]
        before[2, 2] = products[2]
        to_new = torch.eye(3, dtype=pair.dtype)
        to_new[2] = pair.new_tensor([0.0, self.smoothing, 1.0 - self.smoothing])
        return to_new @ before @ to_new.T

    def update(self, retain: Gradients) -> None:
        """Takes in this step's retain gradient, which stays as it is."""
        if self.gradients is None:
            self.gradients = [None] * len(retain)
        for index, (mean, gradient) in enumerate(zip(self.gradients, retain, strict=True)):
            if mean is not None:
                mean.mul_(1.0 - self.smoothing)
            if gradient is not None and mean is not None:
                mean.add_(gradient, alpha=self.smoothing)
            elif gradient is not None:
                self.gradients[index] = gradient * self.smoothing

    def restore(self, gradients: Gradients) -> None:
        """Takes the share that a checkpoint holds."""
        self.gradients = gradients

    def fit(self, retain: Gradients) -> None:
        """Moves a restored mean to where the gradients are. Raises `ValueError` where it is of other parameters."""
        if self.gradients is None:
            return
        shapes = [None if g is None else g.shape for g in self.gradients]
        found = [None if g is None else g.shape for g in retain]
        pairs = zip(shapes, found, strict=False)
        if len(shapes) != len(found) or any(a is not None and b is not None and a != b for a, b in pairs):
            raise ValueError(
                "The mean of the retain gradient in the checkpoint is of other parameters than the ones trained now: "
                "resume with the same model, engine and number of processes."
            )
        self.gradients = [
            mean if mean is None or gradient is None else mean.to(gradient.device)
            for mean, gradient in zip(self.gradients, retain, strict=True)
        ]
