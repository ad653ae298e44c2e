"""Make a language model forget: bi-level unlearning (BLUR) and its baselines as `transformers.Trainer`s."""

from typing import TYPE_CHECKING, Any

from blur_trainer._version import __version__
from blur_trainer.importing import import_quickly

# Names are loaded on first use. `import blur_trainer` alone imports neither torch nor transformers.
_HOMES = {
    "data.formats": ["tokenize_dataset"],
    "data.general": ["general_text"],
    "data.muse": ["load_muse"],
    "data.reading": ["read_rows"],
    "data.tofu": ["load_tofu"],
    "data.wmdp": ["load_wmdp", "load_wmdp_questions"],
    "evaluation.base": ["Evaluation"],
    "evaluation.forget": ["ForgetEvaluation"],
    "evaluation.inside.patching": ["unlearning_depth"],
    "evaluation.inside.probes": ["probe_layers"],
    "evaluation.leakage.estimates": ["leak_at_k"],
    "evaluation.leakage.leak": ["LeakEvaluation"],
    "evaluation.level": ["Level"],
    "evaluation.lm_eval": ["LMEval"],
    "evaluation.muse": ["MUSEEvaluation"],
    "evaluation.robustness.battery": ["prefixed", "quantized", "robustness"],
    "evaluation.robustness.relearning": ["relearn"],
    "evaluation.tofu.aggregates": ["aggregate_log"],
    "evaluation.tofu.reference": ["RetainReference"],
    "evaluation.tofu.suite": ["TOFUEvaluation"],
    "evaluation.wmdp": ["WMDPEvaluation"],
    "gradients.backend": ["GradientBackend"],
    "gradients.rules": ["BLUR", "MGDA", "NGDiff", "PCGrad", "Rule", "Sum"],
    "gradients.stateful_rules": ["GRU", "PDU", "Constrained"],
    "memory.estimate": ["estimate_memory"],
    "models.forward": ["answer_logps", "answer_token_logps", "forward"],
    "models.logit_difference": ["LogitDifferenceModel"],
    "models.task_vector": ["task_vector"],
    "objectives.activations": ["ActivationMatch"],
    "objectives.base": ["Objective"],
    "objectives.contrast": ["FLAT", "JensUn"],
    "objectives.distributions": ["CEU", "JSD", "KL", "UNDIAL", "ClampedEntropy", "Margin", "Uniform"],
    "objectives.level": ["TargetLoss", "Until"],
    "objectives.likelihood": ["IDK", "NLL", "GradAscent"],
    "objectives.rmu": ["RMU"],
    "objectives.weighted": ["SatImp", "WGA"],
    "objectives.preference": ["DPO", "NPO", "AltPO", "SimNPO"],
    "pipeline.audit": ["audit"],
    "pipeline.recommended": ["recommended"],
    "pipeline.unlearn": ["Unlearned", "unlearn"],
    "recipes": ["recipe"],
    "report.html": ["write_report"],
    "report.results": ["Results"],
    "report.seeds": ["mean_and_spread"],
    "report.tables": ["format_table"],
    "report.verdict": ["Thresholds", "Verdict", "judge"],
    "saving.merging": ["merge_and_save"],
    "trainers.alternatives": ["generate_alternatives"],
    "trainers.blur": ["BLURConfig", "BLURTrainer"],
    "trainers.callbacks": ["ProgressBarCallback", "ReportCallback"],
    "trainers.config": ["UnlearningConfig"],
    "trainers.ending": ["TrainingInterrupted"],
    "trainers.grad_diff": ["GradDiffConfig", "GradDiffTrainer"],
    "trainers.procedures": ["SAM"],
    "trainers.replay": ["replay"],
    "trainers.unlearning": ["UnlearningTrainer"],
    "uld.augment": ["paraphrases", "perturbed_answers"],
    "uld.trainer": ["ULDConfig", "ULDTrainer"],
    "uld.tuning": ["tune_weight"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares both
    from blur_trainer.data.formats import tokenize_dataset
    from blur_trainer.data.general import general_text
    from blur_trainer.data.muse import load_muse
    from blur_trainer.data.reading import read_rows
    from blur_trainer.data.tofu import load_tofu
    from blur_trainer.data.wmdp import load_wmdp, load_wmdp_questions
    from blur_trainer.evaluation.base import Evaluation
    from blur_trainer.evaluation.forget import ForgetEvaluation
    from blur_trainer.evaluation.inside.patching import unlearning_depth
    from blur_trainer.evaluation.inside.probes import probe_layers
    from blur_trainer.evaluation.leakage.estimates import leak_at_k
    from blur_trainer.evaluation.leakage.leak import LeakEvaluation
    from blur_trainer.evaluation.level import Level
    from blur_trainer.evaluation.lm_eval import LMEval
    from blur_trainer.evaluation.muse import MUSEEvaluation
    from blur_trainer.evaluation.robustness.battery import prefixed, quantized, robustness
    from blur_trainer.evaluation.robustness.relearning import relearn
    from blur_trainer.evaluation.tofu.aggregates import aggregate_log
    from blur_trainer.evaluation.tofu.reference import RetainReference
    from blur_trainer.evaluation.tofu.suite import TOFUEvaluation
    from blur_trainer.evaluation.wmdp import WMDPEvaluation
    from blur_trainer.gradients.backend import GradientBackend
    from blur_trainer.gradients.rules import BLUR, MGDA, NGDiff, PCGrad, Rule, Sum
    from blur_trainer.gradients.stateful_rules import GRU, PDU, Constrained
    from blur_trainer.memory.estimate import estimate_memory
    from blur_trainer.models.forward import answer_logps, answer_token_logps, forward
    from blur_trainer.models.logit_difference import LogitDifferenceModel
    from blur_trainer.models.task_vector import task_vector
    from blur_trainer.objectives.activations import ActivationMatch
    from blur_trainer.objectives.base import Objective
    from blur_trainer.objectives.contrast import FLAT, JensUn
    from blur_trainer.objectives.distributions import CEU, JSD, KL, UNDIAL, ClampedEntropy, Margin, Uniform
    from blur_trainer.objectives.level import TargetLoss, Until
    from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
    from blur_trainer.objectives.preference import DPO, NPO, AltPO, SimNPO
    from blur_trainer.objectives.rmu import RMU
    from blur_trainer.objectives.weighted import WGA, SatImp
    from blur_trainer.pipeline.audit import audit
    from blur_trainer.pipeline.recommended import recommended
    from blur_trainer.pipeline.unlearn import Unlearned, unlearn
    from blur_trainer.recipes import recipe
    from blur_trainer.report.html import write_report
    from blur_trainer.report.results import Results
    from blur_trainer.report.seeds import mean_and_spread
    from blur_trainer.report.tables import format_table
    from blur_trainer.report.verdict import Thresholds, Verdict, judge
    from blur_trainer.saving.merging import merge_and_save
    from blur_trainer.trainers.alternatives import generate_alternatives
    from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
    from blur_trainer.trainers.callbacks import ProgressBarCallback, ReportCallback
    from blur_trainer.trainers.config import UnlearningConfig
    from blur_trainer.trainers.ending import TrainingInterrupted
    from blur_trainer.trainers.grad_diff import GradDiffConfig, GradDiffTrainer
    from blur_trainer.trainers.procedures import SAM
    from blur_trainer.trainers.replay import replay
    from blur_trainer.trainers.unlearning import UnlearningTrainer
    from blur_trainer.uld.augment import paraphrases, perturbed_answers
    from blur_trainer.uld.trainer import ULDConfig, ULDTrainer
    from blur_trainer.uld.tuning import tune_weight


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'blur_trainer' has no attribute {name!r}")
    return getattr(import_quickly(f"blur_trainer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
