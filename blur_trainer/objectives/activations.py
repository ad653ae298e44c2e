"""Objectives on activations: their base, and the match with the frozen model for retaining."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from blur_trainer.checks import check_fields
from blur_trainer.models.early_exit import activations
from blur_trainer.models.forward import hidden_size
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.losses import activation_loss


@dataclass(frozen=True)
class ActivationObjective(Objective):
    """Base of objectives on the output of one decoder layer. Layers above it are not run.

    An item is a token that is attended to. Prompts count, too. With `masked=False` every position
    counts, padding included, as in the WMDP authors' and BLUR's code. With `skip_shared_start` the first
    `batch["shared_start"]` `(B,)` tokens of an example do not count: what that is, each objective says.
    """

    layer: int = 7
    masked: bool = True
    skip_shared_start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_fields(self, {"layer": "[0, inf)"}, owner=name)
        object.__setattr__(self, "needs_shared_start", self.skip_shared_start)
        self.check_masked("skip_shared_start")

    def check_masked(self, option: str) -> None:
        """Raises `ValueError` where an option that leaves positions out meets `masked=False`."""
        if getattr(self, option) and not self.masked:
            raise ValueError(
                f"{type(self).__name__}: `masked=False` counts every position, so `{option}` has no effect: leave one "
                "out."
            )

    @property
    def top_layer(self) -> int:
        return self.layer

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        """The target of the activations, `(B, T, H)` or `(B, 1, H)`."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        # compute the target first, so that the reference's activations are freed before the model's graph is built
        target = self.target(hidden_size(model), batch, reference)
        mask = self.mask(batch) if self.masked else None
        return activation_loss(activations(model, batch, self.layer), target, mask)

    def mask(self, batch: Batch) -> Tensor:
        """The positions that count, `(B, T)`."""
        attended = batch["attention_mask"]
        if not self.skip_shared_start:
            return attended
        if "shared_start" not in batch:
            raise ValueError(
                f"{type(self).__name__}: `skip_shared_start` needs `batch['shared_start']`, `(B,)`; a trainer makes it "
                "from the sets."
            )
        return attended * (attended.cumsum(-1) > batch["shared_start"][:, None])

    def items(self, batch: Batch) -> Tensor:
        return (self.mask(batch) if self.masked else torch.ones_like(batch["attention_mask"])).sum(-1)


@dataclass(frozen=True)
class ActivationMatch(ActivationObjective):
    r"""Squared distance to the frozen model's activations in one layer, token mean: RMU's retain objective.

    Only the frozen model's layers up to this one are kept and run. `blur_trainer.models.reference` has the cost.

    Args:
        layer, masked: see [`ActivationObjective`].
        skip_shared_start: count a start that several examples have, such as a system prompt, in one of them only. A
            causal model has the same activations there, so counting it in each would leave the rest of the texts a
            smaller share of the mean. Default: as published, all positions.

    Formula: $\frac1H \|h_t(\theta) - h_t(\mathrm{ref})\|^2$
    Bounded: below by 0.
    Use it: with `rmu`.
    Source: Li et al., arXiv 2403.03218.
    """

    needs_reference: ClassVar[bool] = True
    needs_reference_logits: ClassVar[bool] = True

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        if reference is None:
            raise ValueError("ActivationMatch needs a reference model's activations; pass `reference`.")
        return reference.activations(batch, self.layer)
