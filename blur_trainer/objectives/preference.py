"""Preference objectives: the forget answer is the one that is not wanted."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from blur_trainer.checks import check_fields
from blur_trainer.models.forward import answer_logps
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.losses import dpo_loss, npo_loss, simnpo_loss


def reference_logps(batch: Batch, reference: Reference | None) -> Tensor:
    """`log p_ref(answer | prompt)` `(B,)`: the precomputed column if the batch has it, else one forward pass."""
    if "ref_logps" in batch:
        return batch["ref_logps"]
    if reference is None:
        raise ValueError("The batch has no `ref_logps` and there is no reference model to compute them with.")
    return reference.logps(batch)


@dataclass(frozen=True)
class NPO(Objective):
    r"""Negative preference optimization, mean over examples (`losses.npo_loss`).

    Formula: $-\frac{2}{\beta}\log\sigma\big(-\beta\log\frac{p_\theta(y|x)}{p_\mathrm{ref}(y|x)}\big)$
    Bounded: below by 0.
    Use it: as a start. Its first steps are those of gradient ascent; it fades out as $p_\theta$ falls below
        $p_\mathrm{ref}$.
    Source: Zhang et al., arXiv 2404.05868.
    """

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
    r"""SimNPO, mean over examples (`losses.simnpo_loss`): no reference model.

    Formula: $-\frac{2}{\beta}\log\sigma\big(-\frac{\beta}{|y|}\log p_\theta(y|x) - \beta\delta\big)$
    Bounded: below by 0.
    Use it: instead of `npo` where a reference costs too much, or answers differ much in length.
    Source: Fan et al., arXiv 2410.07163.
    """

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
    r"""DPO with a refusal preferred to the forget answer, mean over examples (`losses.dpo_loss`).

    Formula: $-\frac{2}{\beta}\log\sigma\big(\beta\log\frac{p_\theta(\tilde y|x)}{p_\mathrm{ref}(\tilde y|x)}
        - \beta\log\frac{p_\theta(y|x)}{p_\mathrm{ref}(y|x)}\big)$
    Bounded: below by 0.
    Use it: to push the answer down and a refusal up, by one loss.
    Source: Rafailov et al., arXiv 2305.18290; with refusals: TOFU, arXiv 2401.06121.
    """

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
class AltPO(DPO):
    r"""Alternate preference optimization: DPO with another answer of the model itself preferred to the forget answer.

    Formula: $-\frac{2}{\beta}\log\sigma\big(\beta\log\frac{p_\theta(\tilde y|x)}{p_\mathrm{ref}(\tilde y|x)} -
        \beta\log\frac{p_\theta(y|x)}{p_\mathrm{ref}(y|x)}\big)$, $\tilde y$ an alternative answer
    Bounded: below by 0.
    Use it: where questions are to be answered as if nothing were missing, by something else, instead of a refusal.
    Source: Mekala et al., arXiv 2409.13474; defaults of the sampling: the authors' code.

    An alternative is what the forget set's column `alternative` says. Without it the model answers each question
    `num_alternatives` times before training: see [`generate_alternatives`], whose arguments the others are. Each
    alternative makes an example of its own, as in the authors' code, so that one epoch goes through all of them.
    """

    num_alternatives: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 200
    instruct: bool | None = None
    needs_alternatives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one = {"num_alternatives": "[1, inf)", "max_new_tokens": "[1, inf)"}
        ranges = {"beta": "(0, inf)", "temperature": "(0, inf)", "top_p": "(0, 1]"}
        check_fields(self, ranges | at_least_one, owner="AltPO")
