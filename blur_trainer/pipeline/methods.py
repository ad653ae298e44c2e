"""The methods that `unlearn` knows by name. Those with an end of their own keep it; the others end at the level."""

from typing import Any, NamedTuple

from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.effect import settings_read
from blur_trainer.trainers.grad_diff import GradDiffTrainer
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.trainer import ULDTrainer


class Method(NamedTuple):
    """A trainer and the settings that make it the method.

    `leveled`: forgetting ends at the level. `layered`: both objectives are about one layer, which is chosen by depth.
    """

    label: str
    trainer: type[UnlearningTrainer]
    settings: dict[str, Any]
    leveled: bool = True
    layered: bool = False


_RMU: dict[str, Any] = {"forget_objective": "rmu", "retain_objective": "activation_match"}
_TARGET: dict[str, Any] = {"forget_objective": "target_loss", "forget_objective_kwargs": {"two_sided": True}}


def _sum(label: str, objective: str, *, leveled: bool = True, **settings: Any) -> Method:
    return Method(label, UnlearningTrainer, {"forget_objective": objective, **settings}, leveled)


def options_read(method: Method, args: Any) -> set[str]:
    """
    The options that a run reads and a verdict may advise. Objectives are chosen by `method`.

    Args:
        args: of its trainer.
    """
    found = settings_read(args) - {"forget_objective"}
    if not (method.leveled or args.forget_level) or args.stop_at_level:
        found -= {"stop_at_level"}
    return found if args.forget_objective == "target_loss" else found | {"method"}


DEFAULT = "blur"
#: towards what a `LogitDifferenceModel` says: that is the model it is given, and its target is the one that is trained
DISTILL = "distill"
METHODS: dict[str, Method] = {
    "blur": Method("BLUR-RMU", BLURTrainer, _RMU | {"gamma": 0.3}, layered=True),
    "rmu": Method("RMU", UnlearningTrainer, _RMU, layered=True),
    "blur-target": Method("BLUR-Target", BLURTrainer, _TARGET | {"gamma": 0.1}),
    "blur-npo": Method("BLUR-NPO", BLURTrainer, {"forget_objective": "npo", "gamma": 0.3}),
    "npo": _sum("NPO", "npo"),
    "simnpo": _sum("SimNPO", "simnpo"),
    "graddiff": Method("GradDiff", GradDiffTrainer, {"forget_weight": 0.1}),
    "wga": _sum("WGA", "wga"),
    "undial": _sum("UNDIAL", "undial", leveled=False),
    "idk": _sum("IDK", "idk", leveled=False, forget_weight=0.1),
    "uld": Method("ULD", ULDTrainer, {}, leveled=False),
    DISTILL: _sum("Distilled", "distill", leveled=False, retain_objective="kl"),
}
