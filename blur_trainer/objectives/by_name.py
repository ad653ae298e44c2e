"""Objectives by their names on the command line."""

from blur_trainer.objectives.activations import RMU, ActivationMatch
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
from blur_trainer.objectives.preference import DPO, NPO, AltPO, SimNPO

FORGET_OBJECTIVES: dict[str, type[Objective]] = {
    "grad_ascent": GradAscent,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "idk": IDK,
    "rmu": RMU,
    "altpo": AltPO,
}
RETAIN_OBJECTIVES: dict[str, type[Objective]] = {
    "nll": NLL,
    "kl": KL,
    "activation_match": ActivationMatch,
}
