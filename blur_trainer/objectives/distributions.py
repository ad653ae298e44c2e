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
    r"""`KL(p_ref || p_theta)`, mean over the answer tokens.

    Formula: $\mathrm{KL}\big(P^\mathrm{ref}_t\|P_t\big)$
    Bounded: below by 0.
    Use it: instead of `nll` to keep all that the model would say, not the given answer alone.
    Source: TOFU, arXiv 2401.06121; MUSE's "KLR", arXiv 2407.06460.
    """

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
    r"""`KL(U || p_theta)`, mean over the answer tokens (`losses.uniform_loss`). ULD's assistant descends it.

    Formula: $\mathrm{KL}(U\|P_t) = \mathrm{logsumexp}(z_t) - \mathrm{mean}(z_t) - \log V$
    Bounded: below by 0.
    Use it: to make the model say anything with the same probability.
    Source: Ji et al. (ULD), arXiv 2406.08607.
    """

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return uniform_loss(forward(model, batch), batch["labels"])
