"""Objectives on answers: on their log-probabilities, or on the distributions over their tokens."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from blur_trainer.checks import check_fields
from blur_trainer.models.forward import answer_logps, forward
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.losses import (
    dpo_loss,
    grad_ascent_loss,
    kl_loss,
    nll_loss,
    npo_loss,
    simnpo_loss,
    uniform_loss,
)


def reference_logps(batch: Batch, reference: Reference | None) -> Tensor:
    """`log p_ref(answer | prompt)` `(B,)`: the precomputed column if the batch has it, else one forward pass."""
    if "ref_logps" in batch:
        return batch["ref_logps"]
    if reference is None:
        raise ValueError("The batch has no `ref_logps` and there is no reference model to compute them with.")
    return reference.logps(batch)


@dataclass(frozen=True)
class NLL(Objective):
    """Negative log-likelihood, token mean: MUSE's GDR and TOFU's "NLL" on the retain set."""

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return nll_loss(answer_logps(model, batch))


@dataclass(frozen=True)
class GradAscent(Objective):
    """Gradient ascent on the token-mean NLL."""

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return grad_ascent_loss(answer_logps(model, batch))


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
class NPO(Objective):
    """Negative preference optimization, mean over examples (`losses.npo_loss`)."""

    beta: float = 0.1
    per: ClassVar[Literal["token", "example"]] = "example"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, {"beta": "(0, inf)"}, owner="NPO")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        ref_logps = reference_logps(batch, reference)
        return npo_loss(answer_logps(model, batch), ref_logps, self.beta)


@dataclass(frozen=True)
class SimNPO(Objective):
    """SimNPO, mean over examples (`losses.simnpo_loss`): no reference model."""

    beta: float = 4.5
    delta: float = 0.0
    per: ClassVar[Literal["token", "example"]] = "example"

    def __post_init__(self) -> None:
        check_fields(self, {"beta": "(0, inf)", "delta": "(-inf, inf)"}, owner="SimNPO")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        logps = answer_logps(model, batch)
        return simnpo_loss(logps, answer_mask(batch["labels"]).sum(-1), self.beta, self.delta)


@dataclass(frozen=True)
class DPO(Objective):
    """DPO with a refusal preferred to the forget answer, mean over examples (`losses.dpo_loss`)."""

    beta: float = 0.1
    per: ClassVar[Literal["token", "example"]] = "example"
    needs_reference: ClassVar[bool] = True
    needs_refusal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, {"beta": "(0, inf)"}, owner="DPO")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        refusal = batch["refusal"]
        return dpo_loss(
            chosen_logps=answer_logps(model, refusal),
            chosen_ref_logps=reference_logps(refusal, reference),
            rejected_logps=answer_logps(model, batch),
            rejected_ref_logps=reference_logps(batch, reference),
            beta=self.beta,
        )


@dataclass(frozen=True)
class IDK(Objective):
    """NLL on refusals: learn to answer forget questions with "I don't know" (TOFU's IDK baseline)."""

    needs_refusal: ClassVar[bool] = True

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return NLL().losses(model, batch["refusal"], reference)

    def num_items(self, batch: Batch) -> Tensor:
        return answer_mask(batch["refusal"]["labels"]).sum()


@dataclass(frozen=True)
class Uniform(Objective):
    """`KL(U || p_theta)`, mean over the answer tokens (`losses.uniform_loss`). ULD's assistant descends it."""

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return uniform_loss(forward(model, batch), batch["labels"])
