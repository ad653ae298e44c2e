"""The methods that `run_tofu.py --method` and `--compare` know, with their settings for tiny models.

`benchmarks/tune_tofu.py` chose what differs among the tiny settings: four tried values for each method, one rule, a
seed that no table reports. All else is as published. Not so `blur-target` and
`uld`, which got more tries: docs/evidence.md and docs/uld.md say which.
"""

from typing import Any

from blur_trainer.scripts.methods import Method
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.grad_diff import GradDiffTrainer
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.trainer import ULDTrainer

#: methods that train on the forget set alone
FORGET_ONLY = ("gradascent", "undial", "ce-u", "flat")

_ALONE = {"retain_weight": 0.0}
_KEPT = {"precompute_ref_logps": True}
# weight and filter: by the rule of `tune_weight`, the level being the target's loss on authors that nobody saw
_ULD = {
    "num_assistant_layers": 2, "learning_rate": 5e-3, "lr_scheduler_type": "linear", "num_train_epochs": 30,
    "retain_weight": 5.0, "weight": -1.2, "top_logit_filter": 0.0,
}  # fmt: skip
# five alternatives of each answer are five examples: one epoch has as many steps as five of the others
_ALTPO: dict[str, Any] = {
    "forget_objective_kwargs": {"num_alternatives": 5, "max_new_tokens": 32},
    "num_train_epochs": 1,
}
_PDU = {"epsilon": 0.3, "rate": 5.0, "warmup_epochs": 2.5}  # the warm-up is half of the training, as published

_TARGET: dict[str, Any] = {"forget_objective": "target_loss", "forget_objective_kwargs": {"two_sided": True}}
_GENTLE = {"learning_rate": 3e-4, "lr_scheduler_type": "linear", "num_train_epochs": 30}


def _plain(label: str, objective: str, tiny: dict[str, Any], **settings: Any) -> Method:
    return Method(label, UnlearningTrainer, {"forget_objective": objective, **settings}, tiny)


METHODS = {
    "blur-target": Method("BLUR-Target", BLURTrainer, _TARGET, _GENTLE | {"gamma": 0.3}),
    "blur-npo": Method("BLUR-NPO", BLURTrainer, {"forget_objective": "npo"}, _KEPT | {"gamma": 1.0}),
    "npo": _plain("NPO", "npo", _KEPT | {"forget_weight": 1.0}),
    "graddiff": Method("GradDiff", GradDiffTrainer, {}, {"forget_weight": 0.3}),
    "gradascent": Method("GradAscent", GradDiffTrainer, _ALONE, {"learning_rate": 3e-4}),
    "simnpo": _plain("SimNPO", "simnpo", {"forget_weight": 1.0}),
    "dpo": _plain("DPO", "dpo", _KEPT | {"forget_weight": 0.3}),
    "idk": _plain("IDK", "idk", {"forget_weight": 0.03}),
    "undial": _plain("UNDIAL", "undial", {"learning_rate": 1e-3}, **_ALONE),
    "wga": _plain("WGA", "wga", {"forget_weight": 1.0}),
    "satimp": _plain("SatImp", "satimp", {"forget_weight": 1.0}),
    "ce-u": _plain("CE-U", "ce_u", {"learning_rate": 1e-4}, **_ALONE),
    "maximal-entropy": _plain("Maximal entropy", "uniform", {"forget_weight": 0.03}),
    "clamped-entropy": _plain("Clamped entropy", "clamped_entropy", {"forget_weight": 0.1}),
    "jensun": _plain("JensUn", "jensun", {"forget_weight": 1.0}, retain_objective="jsd"),
    "flat": _plain("FLAT", "flat", {"learning_rate": 1e-4}, **_ALONE),
    "altpo": _plain("AltPO", "altpo", _KEPT | _ALTPO | {"forget_weight": 1.0}),
    "ngdiff": _plain("NGDiff", "grad_ascent", {"learning_rate": 1e-3}, rule="ngdiff"),
    "gru": _plain("GRU", "grad_ascent", {"learning_rate": 1e-3}, rule="gru"),
    "pdu": _plain("PDU", "margin", {"rule_kwargs": _PDU | {"initial": 1000.0}}, rule="pdu"),
    "sam-npo": _plain("SAM-NPO", "npo", _KEPT | {"forget_weight": 1.0}, sam_rho=0.01),
    "uld": Method("ULD", ULDTrainer, {"eval_strategy": "no"}, _ULD),
}
