"""Objectives on the likelihood of an answer: raise it, lower it, or raise a refusal's."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from blur_trainer.models.forward import answer_logps, answer_logps_and_router_loss
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.losses import grad_ascent_loss, nll_loss


@dataclass(frozen=True)
class NLL(Objective):
    r"""Negative log-likelihood, token mean: MUSE's GDR and TOFU's "NLL" on the retain set.

    As in the model's own loss, a mixture of experts with `config.output_router_logits=True` adds its load-balancing
    loss (over several micro-batches: their mean, weighted by their numbers of answer tokens).

    Formula: $-\log p_t$
    Bounded: below by 0.
    Use it: with any forget objective; it is the retain half of most papers.
    Source: MUSE's "GDR", arXiv 2407.06460; TOFU's gradient difference, arXiv 2401.06121.
    """

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        logps, router_loss = answer_logps_and_router_loss(model, batch)
        if router_loss is None:
            return nll_loss(logps)
        return nll_loss(logps) + router_loss * answer_mask(batch["labels"]).sum(-1)


@dataclass(frozen=True)
class GradAscent(Objective):
    r"""Gradient ascent on the token-mean NLL.

    Formula: $\log p_t$
    Bounded: no.
    Use it: as a baseline, for few steps. It never ends by itself, and the model falls apart.
    Source: Jang et al., arXiv 2210.01504.
    """

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return grad_ascent_loss(answer_logps(model, batch))


@dataclass(frozen=True)
class IDK(Objective):
    r"""NLL on refusals: learn to answer forget questions with "I don't know" (TOFU's IDK baseline).

    Formula: $-\log \tilde p_t$
    Bounded: below by 0.
    Use it: to teach a refusal. It does not push the old answer down itself.
    Source: Maini et al. (TOFU), arXiv 2401.06121.
    """

    needs_refusal: ClassVar[bool] = True

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return NLL().losses(model, batch["refusal"], reference)

    def items(self, batch: Batch) -> Tensor:
        return answer_mask(batch["refusal"]["labels"]).sum(-1)
