"""How the gradient of an objective is made: by one pass, or by passes at weights that were moved (SAM)."""

from dataclasses import dataclass
from typing import Any, Protocol

from accelerate.logging import get_logger
from torch import Tensor

from blur_trainer.checks import check_fields
from blur_trainer.gradients.perturbation import perturbed
from blur_trainer.models.reference import partition_shape
from blur_trainer.trainers.step import Step, objective_pass

logger = get_logger(__name__)


class Procedure(Protocol):
    """Runs passes of one role over the window and leaves its gradient where the engine keeps it. Returns the loss."""

    def __call__(self, step: Step, role: str, /) -> Tensor: ...


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization: the gradient at `theta + rho g / ||g||`, with `g` the gradient at `theta`.

    The loss then falls in a neighborhood, not at one point only, so relearning brings less back. It costs a second
    pass of the objective. Its memory is that of the usual step: while the weights are moved, the gradient's slot keeps
    the old ones, and these come back bit for bit. The logged loss is that at `theta`.

    Args:
        rho: how far the weights move (Euclidean norm over all trained weights).

    Source: Foret et al. 2021, arXiv 2010.01412; for the forget objective: Fan et al. 2025, arXiv 2502.05374 (SAM-NPO).
    A weight moves by about `rho / sqrt(number of weights)`. In bfloat16 that is mostly lost in rounding.
    """

    rho: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, {"rho": "(0, inf)"}, owner="SAM")

    def __call__(self, step: Step, role: str) -> Tensor:
        loss = objective_pass(step, role)
        step.backend.take(role)
        norm = step.backend.norm(role)
        # no direction, or none that is finite: the gradient where the weights are, and the step decides about it
        scale = self.rho / norm if 0 < norm < float("inf") else 0.0
        if not scale:
            step.backend.slots.pop(role)
            return objective_pass(step, role)
        with perturbed(step.backend, role, scale):
            objective_pass(step, role)
        return loss


def warn_of_rounding(procedure: Procedure | None, model: Any, half: bool) -> None:
    """Says so where SAM moves weights by less than the forward pass can see. `half`: it computes in 16 bits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(procedure, SAM) and (half or any(p.element_size() == 2 for p in trained)):
        count = sum(partition_shape(p).numel() for p in trained)
        logger.warning(
            f"SAM moves each of {count:.2g} weights by about {procedure.rho / max(count, 1) ** 0.5:.1e}. The passes "
            "compute in 16 bits, where a weight of .02 has steps of 1e-4: most moves are lost in rounding. Set "
            "`bf16=False` with float32 weights, or a larger `sam_rho`."
        )
