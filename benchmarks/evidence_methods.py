"""The methods of benchmarks/evidence.py, and the three values of each one's strength that are tried."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: 10 epochs of 200 questions; retain rows and replay are drawn as often. All methods train so, but for what they vary.
COMMON = {
    "num_train_epochs": 10, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
    "max_length": 512, "logging_steps": 50, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "bf16": False,
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """
    A method of the sweep.

    `settings` of `UnlearningConfig`; `put` writes a strength into them. `level`: the forget loss ends at the level.
    """

    label: str
    strengths: tuple[float, ...]
    put: Callable[[dict[str, Any], float], None]
    settings: dict[str, Any] = field(default_factory=dict)
    level: bool = False

    def config(self, strength: float, level: float) -> dict[str, Any]:
        config = {**COMMON, **self.settings}
        if self.level:
            config |= {"forget_level": level}
        self.put(config, strength)
        return config


def _setting(name: str) -> Callable[[dict[str, Any], float], None]:
    def put(config: dict[str, Any], value: float) -> None:
        config[name] = value

    return put


def _argument(of: str, name: str) -> Callable[[dict[str, Any], float], None]:
    def put(config: dict[str, Any], value: float) -> None:
        config[of] = {**config.get(of, {}), name: value}

    return put


_BETA = _argument("forget_objective_kwargs", "beta")
_NPO: dict[str, Any] = {"forget_objective": "npo", "precompute_ref_logps": True}
_TARGET: dict[str, Any] = {"forget_objective": "target_loss", "forget_objective_kwargs": {"two_sided": True}}
_PDU = {"epsilon": 0.3, "rate": 5.0, "warmup_epochs": 2.5}

_RMU_ENDS = {"forget_objective": "rmu", "retain_objective": "activation_match"}
_LAYER = {f"{name}_kwargs": {"layer": 3} for name in ("forget_objective", "retain_objective")}
_NGDIFF = {"forget_objective": "grad_ascent", "rule": "ngdiff"}
_BLUR_NPO = {**_NPO, "rule": "blur", "gamma": 0.3}
_ASSISTANT = {"num_assistant_layers": 3, "learning_rate": 5e-3, "num_train_epochs": 15, "retain_weight": 1.0}
_MASKED = {**_TARGET, "rule": "blur", "mask_share": 0.1, "mask_score": "fisher", "learning_rate": 4e-3}
_RATE, _GAMMA, _WEIGHT = (_setting(name) for name in ("learning_rate", "gamma", "forget_weight"))

CANDIDATES = {
    "graddiff": Candidate("GradDiff", (0.03, 0.1, 0.3), _WEIGHT, {"forget_objective": "grad_ascent"}),
    # how far NPO and SimNPO push is set by beta, how hard by the weight
    "npo": Candidate("NPO", (0.1, 0.03, 0.01), _BETA, _NPO),
    "simnpo": Candidate("SimNPO", (4.5, 1.0, 0.3), _BETA, {"forget_objective": "simnpo"}),
    "rmu": Candidate("RMU", (3e-4, 1e-3, 3e-3), _RATE, {**_RMU_ENDS, **_LAYER}),
    "rmu-level": Candidate("RMU, level", (3e-4, 1e-3, 3e-3), _RATE, {**_RMU_ENDS, **_LAYER}, level=True),
    "blur-rmu-level": Candidate(
        "BLUR-RMU, level", (0.1, 0.3, 1.0), _GAMMA, {**_RMU_ENDS, **_LAYER, "rule": "blur"}, level=True
    ),
    "undial": Candidate("UNDIAL", (0.3, 1.0, 3.0), _WEIGHT, {"forget_objective": "undial"}),
    "pdu": Candidate(
        "PDU", (100.0, 300.0, 1000.0), _argument("rule_kwargs", "initial"),
        {"forget_objective": "margin", "rule": "pdu", "rule_kwargs": _PDU},
    ),
    "ngdiff": Candidate("NGDiff", (1e-4, 3e-4, 1e-3), _RATE, _NGDIFF),
    "pcgrad-npo": Candidate("PCGrad-NPO", (0.1, 0.03, 0.01), _BETA, {**_NPO, "rule": "pcgrad"}),
    "blur-npo": Candidate("BLUR-NPO", (0.1, 0.03, 0.01), _BETA, _BLUR_NPO),
    "blur-sam": Candidate("BLUR-SAM-NPO", (0.1, 0.03, 0.01), _BETA, {**_BLUR_NPO, "sam_rho": 0.01}),
    "blur-target": Candidate("BLUR-Target", (0.03, 0.1, 0.3), _GAMMA, {**_TARGET, "rule": "blur"}, level=True),
    "blur-target-mask": Candidate("BLUR-Target, mask", (0.03, 0.1, 0.3), _GAMMA, _MASKED, level=True),
    "sum-target": Candidate("Sum-Target", (0.03, 0.1, 0.3), _WEIGHT, _TARGET, level=True),
}  # fmt: skip
#: ULD has an assistant instead: its strength needs no training
ULD = Candidate("ULD", (-0.5, -1.0, -1.5), _setting("weight"), _ASSISTANT)
