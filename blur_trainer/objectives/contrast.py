"""Bounded objectives that raise a refusal's probabilities, token by token."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from blur_trainer.models.forward import answer_token_logps
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.token_losses import flat_loss, jensun_loss


@dataclass(frozen=True)
class JensUn(Objective):
    r"""Jensen-Shannon divergence to a refusal, mean over the refusal's tokens (`token_losses.jensun_loss`).

    Formula: $\mathrm{JSD}\big(P_t\|\delta_{\tilde y_t}\big) = \log 2 + \frac12\big(\tilde p_t\log\tilde p_t
        - (1+\tilde p_t)\log(1+\tilde p_t)\big)$
    Bounded: below by 0, above by $\log 2$.
    Use it: instead of `idk`, so that tokens which the model finds impossible do not rule the step.
    Source: Singh et al., arXiv 2509.02820.
    """

    needs_refusal: ClassVar[bool] = True

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return jensun_loss(answer_token_logps(model, batch["refusal"]))

    def items(self, batch: Batch) -> Tensor:
        return answer_mask(batch["refusal"]["labels"]).sum(-1)


@dataclass(frozen=True)
class FLAT(Objective):
    r"""FLAT with the total variation: forget answer down, refusal up, mean over examples (`token_losses.flat_loss`).

    Formula: $\frac12\tanh\big(\overline{p_t}\big) - \frac12\tanh\big(\overline{\tilde p_t}\big)$, means over the tokens
        of an answer
    Bounded: below by $-\frac12\tanh 1$, above by $\frac12\tanh 1$.
    Use it: where there is no retain data; refusals are the template answers.
    Source: Wang et al., arXiv 2410.11143.
    """

    per: ClassVar[Literal["token", "example"]] = "example"
    needs_refusal: ClassVar[bool] = True

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        refusal = batch["refusal"]
        return flat_loss(
            answer_token_logps(model, batch),
            answer_mask(batch["labels"]),
            answer_token_logps(model, refusal),
            answer_mask(refusal["labels"]),
        )
