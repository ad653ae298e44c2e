"""Forgetting that ends at a level: how well a model may know an answer that never saw it, in nats per token."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from blur_trainer.checks import check_fields
from blur_trainer.models.forward import answer_logps, evaluating
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.losses import target_loss

#: what a trainer asks of an objective, beside its methods
_ASKED = (
    *("per", "needs_reference", "needs_reference_logits", "needs_logits"),
    *("needs_refusal", "needs_alternatives", "needs_shared_start", "needs_own_words"),
)


#: an answer is brought back where its loss is more than so many times the level. Brought back from the level on, rows
#: have one and the same loss, and are easier to tell from unseen ones (docs/evidence.md)
BEYOND = 1.25


@dataclass(frozen=True)
class TargetLoss(Objective):
    r"""Push the loss of each answer up to a level, and no further; mean over examples (`losses.target_loss`).

    Args:
        level: nats per answer token, for all examples. `None`: that of each example, `batch["forget_level"]` `(B,)`,
            which is the forget set's column `forget_level`.
        two_sided: also pull back an answer whose loss is above the level.

    Formula: $\frac12\,\mathrm{relu}\big(c - \ell\big)^2$, $\ell = -\frac{1}{|y|}\log p_\theta(y|x)$, $c$ the `level`;
        `two_sided`: $\frac12(c - \ell)^2$
    Bounded: below by 0, where $\ell \geq c$.
    Use it: where it is known how well a model may know the answers, from one that never saw them or from unseen text.
    Source: ours; Jang et al., arXiv 2210.01504, stop ascent where an answer is as likely as unseen text.
    """

    level: float | None = None
    two_sided: bool = False
    per: ClassVar[Literal["token", "example"]] = "example"

    def __post_init__(self) -> None:
        check_fields(self, {"level": "(0, inf)"}, owner="TargetLoss")
        object.__setattr__(self, "needs_level", self.level is None)

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        lengths = answer_mask(batch["labels"]).sum(-1)
        return target_loss(answer_logps(model, batch), lengths, level_of(self, batch), self.two_sided)


@dataclass(frozen=True)
class Until(Objective):
    r"""Another forget objective, until an example's answer has reached its level: from there on it pushes no more.

    The loss of such an example is 0, and it still counts as an item. So the forget gradient vanishes as the examples
    arrive. One that falls below its level again, because retaining brings it back, pushes again.

    Args:
        objective: what to descend below the level, e.g. `NPO()`.
        level: as of [`TargetLoss`].
        two_sided: also bring back an answer whose loss $\ell$ is far above the level $c$, with the weight
            $\ell/c - 1.25$, at most 1. One large step may carry an answer there. Of [`RMU`] alone, which then draws the
            activations to those of the frozen model; of likelihoods [`TargetLoss`] does it.

    Whether an answer has reached its level is read from one more forward pass, in evaluation mode and without a
    gradient: about a third of the forget pass. The objective's own pass would not always do: it may have dropout, end
    at a layer (`RMU`), or be of another answer (`IDK`). With preference objectives the level is of the forget answer,
    not of the refusal. Under [`SAM`] it is asked where the weights are at each pass.
    """

    objective: Objective
    level: float | None = None
    two_sided: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective) or isinstance(self.objective, TargetLoss | Until):
            raise TypeError(
                f"Until: `objective` must be a forget objective without a level, such as `NPO()`, got "
                f"{self.objective!r}."
            )
        check_fields(self, {"level": "(0, inf)"}, owner="Until")
        if self.two_sided and not self.objective.brings_back:
            raise ValueError(
                f"Until: `two_sided` needs an objective that can bring answers back, which is `RMU`, got "
                f"{self.objective}: leave it out, or choose `TargetLoss(two_sided=True)`."
            )
        for name in _ASKED:
            object.__setattr__(self, name, getattr(self.objective, name))
        if self.two_sided:  # the frozen model's activations
            object.__setattr__(self, "needs_reference", True)
            object.__setattr__(self, "needs_reference_logits", True)
        object.__setattr__(self, "needs_level", self.level is None)

    @property
    def top_layer(self) -> int | None:
        """That of the objective: nothing above it gets a gradient. The pass that reads the level runs all layers."""
        return self.objective.top_layer

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        # first, so that its logits are freed before the objective's graph is built
        ratio = answer_nll(model, batch) / level_of(self, batch)
        if not self.two_sided:
            return self.objective.losses(model, batch, reference).masked_fill(ratio >= 1, 0.0)
        losses = self.objective.losses(model, {**batch, "beyond": ratio >= 1}, reference)
        return losses * torch.where(ratio >= 1, (ratio - BEYOND).clamp(0, 1), 1)

    def num_items(self, batch: Batch) -> Tensor:
        return self.objective.num_items(batch)

    def save_state(self, folder: str | Path, model: nn.Module) -> None:
        self.objective.save_state(folder, model)

    def load_state(self, folder: str | Path, model: nn.Module) -> None:
        self.objective.load_state(folder, model)


def answer_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats per answer token `(B,)`, in evaluation mode and without a gradient."""
    with evaluating(model):
        logps = answer_logps(model, batch)
    # Autocast keeps casts of the weights for the rest of the step: none without a graph may serve a pass with one.
    torch.clear_autocast_cache()
    return -logps / answer_mask(batch["labels"]).sum(-1)


def level_of(objective: Any, batch: Batch) -> Tensor | float:
    """The objective's own level, or that of each example."""
    if objective.level is not None:
        return objective.level
    if "forget_level" not in batch:
        raise ValueError(
            f"{objective} has no `level`, and the batch no `forget_level`: give a level in nats per token, or a forget "
            "set with a column `forget_level`."
        )
    return batch["forget_level"]


def without_level(objective: Objective) -> Objective:
    """What [`Until`] wraps; any other objective as it is."""
    return objective.objective if isinstance(objective, Until) else objective


def with_level(objective: Objective, level: float | str | None, two_sided: bool = False) -> Objective:
    """
    The forget objective with a level: its own, if it has one to set, else inside [`Until`].

    Args:
        objective: of the user's, or by name.
        level: nats per token, `"column"` for that of each example, or `None`: the objective keeps its own, if any.
        two_sided: whether an answer that has gone beyond the level is brought back. An objective that does so stays.

    Raises:
        ValueError: the objective has another level already, or cannot bring answers back.
    """
    if level is None:
        if two_sided and isinstance(objective, TargetLoss | Until):
            return dataclasses.replace(objective, two_sided=True)
        return objective
    number = None if level == "column" else float(level)
    if not isinstance(objective, TargetLoss | Until):
        return Until(objective, number, two_sided)
    if objective.level not in (None, number):
        raise ValueError(
            f"`forget_level={level!r}`, but the forget objective is {objective}: give the level in one place only."
        )
    return dataclasses.replace(objective, level=number, two_sided=two_sided or objective.two_sided)
