"""Gradient ascent that weighs the tokens of an answer by their probabilities."""

from dataclasses import dataclass

from torch import Tensor, nn

from blur_trainer.checks import check_fields
from blur_trainer.models.forward import answer_token_logps
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.token_losses import satimp_loss, wga_loss


@dataclass(frozen=True)
class WGA(Objective):
    r"""Weighted gradient ascent, mean over the answer tokens (`token_losses.wga_loss`).

    Formula: $\mathrm{sg}[p_t^\beta]\,\log p_t$, with the gradient of $p_t^\beta/\beta$
    Bounded: below by 0, as $p_t^\beta/\beta$; the logged value rises again as $p_t \to 0$.
    Use it: instead of `grad_ascent`, so that tokens which are forgotten are left alone.
    Source: Wang et al., arXiv 2502.19301.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, {"beta": "[0, inf)"}, owner="WGA")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return wga_loss(answer_token_logps(model, batch), self.beta)


@dataclass(frozen=True)
class SatImp(Objective):
    r"""Ascent weighted by saturation and importance, mean over the answer tokens (`token_losses.satimp_loss`).

    Formula: $\mathrm{sg}[p_t^{\beta_1}(1-p_t)^{\beta_2}]\,\log p_t$, with the gradient of
        $\int_0^{p_t} q^{\beta_1-1}(1-q)^{\beta_2}\,dq$
    Bounded: below by 0, as this integral.
    Use it: instead of `wga`, to spare the tokens too that are certain.
    Source: Yang et al., arXiv 2505.11953; defaults as in open-unlearning.
    """

    beta1: float = 5.0
    beta2: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, {"beta1": "[0, inf)", "beta2": "[0, inf)"}, owner="SatImp")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return satimp_loss(answer_token_logps(model, batch), self.beta1, self.beta2)
