"""Make a language model forget: bi-level unlearning (BLUR) and its baselines as `transformers.Trainer`s."""

from blur_trainer._version import __version__
from blur_trainer.data.formats import chunk_documents, tokenize_dataset
from blur_trainer.data.muse import AUC_RETRAIN, MUSE_MODELS, limit_documents, load_muse, muse_stages
from blur_trainer.data.subset import limit_rows, sample_rows
from blur_trainer.data.tofu import TOFU_MODELS, TOFU_SPLITS, load_tofu, tofu_corpora, tofu_training_rows
from blur_trainer.data.tofu_templates import TOFU_TEMPLATES, TOFUTemplate, apply_template
from blur_trainer.data.wmdp import load_wmdp_corpora, load_wmdp_questions
from blur_trainer.evaluation.lm_eval import LMEval
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.evaluation.muse import MUSEEvaluation
from blur_trainer.evaluation.robustness.battery import prefixed, quantized, robustness
from blur_trainer.evaluation.robustness.quantization import quantize_dequantize
from blur_trainer.evaluation.robustness.relearning import relearn
from blur_trainer.evaluation.tofu.reference import RetainReference
from blur_trainer.evaluation.tofu.suite import TOFUEvaluation
from blur_trainer.evaluation.wmdp import WMDPEvaluation
from blur_trainer.gradients.rules import BLUR, MGDA, PCGrad, Rule, Sum
from blur_trainer.memory.estimate import MemoryEstimate, estimate_memory
from blur_trainer.models.logit_composition import ULDLogitsProcessor
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.task_vector import task_vector
from blur_trainer.models.truncation import lora_assistant, truncated_view
from blur_trainer.objectives.activations import RMU, ActivationMatch
from blur_trainer.objectives.answers import DPO, IDK, KL, NLL, NPO, GradAscent, SimNPO, Uniform
from blur_trainer.objectives.base import Objective
from blur_trainer.recipes import recipe, recipe_names
from blur_trainer.report.html import write_report
from blur_trainer.report.results import Results
from blur_trainer.report.seeds import mean_and_spread
from blur_trainer.report.tables import format_table, robustness_rows
from blur_trainer.saving.merging import merge_and_save
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.toy.memorize import memorize, memorized
from blur_trainer.toy.model import tiny_llama, train_tokenizer
from blur_trainer.toy.muse import muse_corpora, training_texts
from blur_trainer.toy.wmdp import topic_corpora, topic_lessons, topic_questions
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.trainers.callbacks import ProgressBarCallback, ReportCallback
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.grad_diff import GradDiffConfig, GradDiffTrainer
from blur_trainer.trainers.loading import unsharded_loading
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.augment import paraphrases, perturbed_answers
from blur_trainer.uld.trainer import ULDConfig, ULDTrainer
from blur_trainer.uld.tuning import Tuning, tune_weight

__all__ = [
    "AUC_RETRAIN",
    "BLUR",
    "DPO",
    "IDK",
    "KL",
    "MGDA",
    "MUSE_MODELS",
    "NLL",
    "NPO",
    "RMU",
    "TOFU_MODELS",
    "TOFU_SPLITS",
    "TOFU_TEMPLATES",
    "ActivationMatch",
    "BLURConfig",
    "BLURTrainer",
    "GradAscent",
    "GradDiffConfig",
    "GradDiffTrainer",
    "LMEval",
    "LogitDifferenceConfig",
    "LogitDifferenceModel",
    "MUSEEvaluation",
    "MemoryEstimate",
    "Objective",
    "PCGrad",
    "ProgressBarCallback",
    "ReportCallback",
    "Results",
    "RetainReference",
    "Rule",
    "SimNPO",
    "Sum",
    "TOFUEvaluation",
    "TOFUTemplate",
    "Tuning",
    "ULDConfig",
    "ULDLogitsProcessor",
    "ULDTrainer",
    "Uniform",
    "UnlearningConfig",
    "UnlearningTrainer",
    "WMDPEvaluation",
    "__version__",
    "apply_template",
    "check_output_dir",
    "chunk_documents",
    "estimate_memory",
    "format_table",
    "limit_documents",
    "limit_rows",
    "load_muse",
    "load_tofu",
    "load_wmdp_corpora",
    "load_wmdp_questions",
    "lora_assistant",
    "mean_and_spread",
    "memorize",
    "memorized",
    "merge_and_save",
    "muse_corpora",
    "muse_stages",
    "paraphrases",
    "perturbed_answers",
    "prefixed",
    "quantize_dequantize",
    "quantized",
    "recipe",
    "recipe_names",
    "relearn",
    "robustness",
    "robustness_rows",
    "sample_rows",
    "task_vector",
    "tiny_llama",
    "tofu_corpora",
    "tofu_training_rows",
    "tokenize_dataset",
    "topic_corpora",
    "topic_lessons",
    "topic_questions",
    "train_tokenizer",
    "training_texts",
    "truncated_view",
    "tune_weight",
    "unsharded_loading",
    "write_report",
    "write_tasks",
]
