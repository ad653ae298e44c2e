"""Gradient difference: `UnlearningTrainer` with other defaults."""

from dataclasses import dataclass, field

from blur_trainer.objectives.by_name import FORGET_OBJECTIVES
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer


@dataclass
class GradDiffConfig(UnlearningConfig):
    """[`UnlearningConfig`] with `rule="sum"` and gradient ascent on the forget set (Liu et al. 2022, "GradDiff")."""

    forget_objective: str = field(
        default="grad_ascent",
        metadata={"help": "What to descend on the forget set.", "choices": list(FORGET_OBJECTIVES)},
    )


class GradDiffTrainer(UnlearningTrainer):
    """Weighted sum of both losses. See [`UnlearningTrainer`] for the arguments and [`Sum`] for the rule."""

    config_class = GradDiffConfig
