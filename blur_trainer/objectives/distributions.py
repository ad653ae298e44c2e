"""Objectives on whole distributions over the vocabulary, at the tokens of answers."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from blur_trainer.checks import check_fields
from blur_trainer.models.forward import forward
from blur_trainer.models.logps import answer_mask, without_first
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.distribution_losses import (
    ce_u_loss,
    clamped_entropy_loss,
    jsd_loss,
    margin_loss,
    undial_loss,
)
from blur_trainer.objectives.losses import kl_loss, uniform_loss


@dataclass(frozen=True)
class DistributionObjective(Objective):
    """Base of these objectives. They read the model's logits."""

    needs_logits: ClassVar[bool] = True


@dataclass(frozen=True)
class ReferenceObjective(DistributionObjective):
    """Base of the objectives that compare with the reference's distributions."""

    needs_reference: ClassVar[bool] = True
    needs_reference_logits: ClassVar[bool] = True

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        if reference is None:
            raise ValueError(f"{type(self).__name__} needs a reference model's logits; pass `reference`.")
        # run the reference first, so that its activations are freed before the model's graph is built
        ref_logits = reference.logits(batch)
        return self.compare(forward(model, batch), ref_logits, batch["labels"])

    def compare(self, logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
        """`(B, T, V)` logits of the model and of the reference, `(B, T)` labels -> `(B,)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class KL(ReferenceObjective):
    r"""`KL(p_ref || p_theta)`, mean over the answer tokens.

    Formula: $\mathrm{KL}\big(P^\mathrm{ref}_t\|P_t\big)$
    Bounded: below by 0.
    Use it: instead of `nll` to keep all that the model would say, not the given answer alone.
    Source: TOFU, arXiv 2401.06121; MUSE's "KLR", arXiv 2407.06460.
    """

    def compare(self, logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
        return kl_loss(logits, ref_logits, labels)


@dataclass(frozen=True)
class Distillation(KL):
    r"""`KL(p_teacher || p_theta)` on the forget set. The teacher, which has forgotten, is the trainer's `ref_model`.

    Formula: $\mathrm{KL}\big(P^\mathrm{teacher}_t\|P_t\big)$
    Bounded: below by 0.
    Use it: to write what a composed model says (ULD, offset, WHP) into ordinary weights, with `kl` for retaining.
    Source: Hinton et al., arXiv 1503.02531, at temperature 1.
    """


@dataclass(frozen=True)
class JSD(ReferenceObjective):
    r"""Jensen-Shannon divergence to the reference, mean over the answer tokens: JensUn's retain objective.

    Formula: $\mathrm{JSD}\big(P^\mathrm{ref}_t, P_t\big) = \frac12\mathrm{KL}\big(P^\mathrm{ref}_t\|M_t\big)
        + \frac12\mathrm{KL}\big(P_t\|M_t\big)$, $M_t = \frac12\big(P^\mathrm{ref}_t + P_t\big)$
    Bounded: above and below, [0, log 2].
    Use it: instead of `kl` where a few tokens far from the reference would outweigh all others; with `jensun`.
    Source: Singh et al. (JensUn), arXiv 2509.02820; there both weights are 1, for 10 epochs.
    """

    def compare(self, logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
        return jsd_loss(logits, ref_logits, labels)


@dataclass(frozen=True)
class UNDIAL(ReferenceObjective):
    r"""UNDIAL, self-distillation: towards the reference with the answer token's logit lowered by `beta`.

    Formula: $-\sum_v Q_t(v)\log P_t(v)$,
        $Q_t = \mathrm{softmax}\big(z^\mathrm{ref}_t - \beta\,\mathrm{onehot}(y_t)\big)$
    Bounded: below by the entropy of $Q_t$.
    Use it: for a fixed goal, which many steps cannot overshoot, often without a retain objective.
    Source: Dong et al., arXiv 2402.10052; default: open-unlearning's (rate 1e-4, 10 epochs, no retain loss).
    """

    beta: float = 10.0

    def __post_init__(self) -> None:
        check_fields(self, {"beta": "(0, inf)"}, owner="UNDIAL")

    def compare(self, logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
        return undial_loss(logits, ref_logits, labels, self.beta)


@dataclass(frozen=True)
class CEU(DistributionObjective):
    r"""CE-U, cross-entropy unlearning: towards the model's own distribution without the answer token.

    Args:
        skip: answer tokens at the start of each example that do not count. It is 1 in the author's code and in a
            footnote of the paper.

    Formula: $-\sum_v \mathrm{sg}[Q_t(v)]\log P_t(v)$, $Q_t(y_t) = 0$, $Q_t(v) = P_t(v)/(1 - p_t)$ elsewhere
    Bounded: below by 0.
    Use it: without a reference and without retain data, where gradient ascent would run away.
    Source: Yang, arXiv 2503.01224; no retain loss there.
    """

    skip: int = 0

    def __post_init__(self) -> None:
        check_fields(self, {"skip": "[0, inf)"}, owner="CEU")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return ce_u_loss(forward(model, batch), without_first(batch["labels"], self.skip))

    def items(self, batch: Batch) -> Tensor:
        return answer_mask(without_first(batch["labels"], self.skip)).sum(-1)


@dataclass(frozen=True)
class Uniform(DistributionObjective):
    r"""`KL(U || p_theta)`, mean over the answer tokens (`losses.uniform_loss`). ULD's assistant descends it.

    Formula: $\mathrm{KL}(U\|P_t) = \mathrm{logsumexp}(z_t) - \mathrm{mean}(z_t) - \log V$
    Bounded: below by 0.
    Use it: to make the model say anything with the same probability.
    Source: Ji et al. (ULD), arXiv 2406.08607; as "maximal entropy" on the forget set: Yuan et al., arXiv 2410.08109
        (forget weight .1, learning rate 1e-5, 5 epochs).
    """

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return uniform_loss(forward(model, batch), batch["labels"])


@dataclass(frozen=True)
class ClampedEntropy(DistributionObjective):
    r"""Raises the entropy of every answer token to a share of the largest one, then does nothing.

    Formula: $\max\big(0, \tau\log V - H(P_t)\big)$
    Bounded: above and below, [0, $\tau\log V$].
    Use it: instead of `uniform`, to end where the model is unsure enough.
    Source: BLADE, arXiv 2608.22557.
    """

    tau: float = 0.7

    def __post_init__(self) -> None:
        check_fields(self, {"tau": "(0, 1]"}, owner="ClampedEntropy")

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return clamped_entropy_loss(forward(model, batch), batch["labels"], self.tau)


@dataclass(frozen=True)
class Margin(DistributionObjective):
    r"""Pulls the highest logit down to the mean of all: PDU's forget objective.

    Formula: $\big(\max z_t - \mathrm{mean}\,z_t\big)^2$
    Bounded: below by 0.
    Use it: as `uniform`, with a gradient that does not fade where the model is sure; with PDU's rule.
    Source: Entesari et al. (PDU), arXiv 2506.05314.
    """

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        return margin_loss(forward(model, batch), batch["labels"])
