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

    def gramian(self, before: Tensor) -> Tensor:
        """`(3, 3)` of forget, retain and the mean before this step -> with the mean after it. Changes nothing."""
        to_new = torch.eye(3, dtype=before.dtype)
        to_new[2] = before.new_tensor([0.0, self.smoothing, 1.0 - self.smoothing])
        return to_new @ before @ to_new.T

    def update(self, retain: Gradients) -> None:
        """Takes in this step's retain gradient, which stays as it is."""
        means = [None] * len(retain) if self.gradients is None else self.gradients
        both = [(m, g) for m, g in zip(means, retain, strict=True) if m is not None and g is not None]
        if both:  # foreach refuses empty lists
            torch._foreach_lerp_([m for m, _ in both], [g for _, g in both], self.smoothing)
        self.gradients = [
            mean if mean is not None and gradient is not None else self._alone(mean, gradient)
            for mean, gradient in zip(means, retain, strict=True)
        ]

    def _alone(self, mean: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        if mean is not None:
            return mean.mul_(1.0 - self.smoothing)
        return None if gradient is None else gradient * self.smoothing

    def restore(self, gradients: Gradients | None) -> None:
        """Takes the share that a checkpoint holds; `None`: it was saved before the first step that was made."""
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
