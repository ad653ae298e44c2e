"""Objectives by their names on the command line."""

from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.contrast import FLAT, JensUn
from blur_trainer.objectives.distributions import CEU, JSD, KL, UNDIAL, ClampedEntropy, Distillation, Margin, Uniform
from blur_trainer.objectives.level import TargetLoss
from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
from blur_trainer.objectives.preference import DPO, NPO, AltPO, SimNPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.objectives.weighted import WGA, SatImp

FORGET_OBJECTIVES: dict[str, type[Objective]] = {
    "grad_ascent": GradAscent,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "idk": IDK,
    "rmu": RMU,
    "wga": WGA,
    "satimp": SatImp,
    "jensun": JensUn,
    "flat": FLAT,
    "altpo": AltPO,
    "undial": UNDIAL,
    "ce_u": CEU,
    "uniform": Uniform,
    "clamped_entropy": ClampedEntropy,
    "margin": Margin,
    "target_loss": TargetLoss,
    "distill": Distillation,
}
RETAIN_OBJECTIVES: dict[str, type[Objective]] = {
    "nll": NLL,
    "kl": KL,
    "activation_match": ActivationMatch,
    "jsd": JSD,
}
