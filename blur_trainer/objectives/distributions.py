"""Objectives on whole distributions over the vocabulary, at the tokens of answers."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from blur_trainer.models.forward import forward
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.losses import kl_loss, uniform_loss


@dataclass(frozen=True)
class KL(Objective):
    """`KL(p_ref || p_theta)`, mean over the answer tokens."""

    needs_reference: ClassVar[bool] = True
    needs_reference_logits: ClassVar[bool] = True

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        if reference is None:
            raise ValueError("KL needs a reference model's logits; pass `reference`.")
        # run the reference first, so that its activations are freed before the model's graph is built
        ref_logits = reference.logits(batch)
        return kl_loss(forward(model, batch), ref_logits, batch["labels"])


@dataclass(frozen=True)
class Uniform(Objective):
    """`KL(U || p_theta)`, mean over the answer tokens (`losses.uniform_loss`). ULD's assistant descends it."""

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return uniform_loss(forward(model, batch), batch["labels"])
