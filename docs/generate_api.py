"""Writes docs/api.md from the docstrings of the public names: `python docs/generate_api.py`. A test compares."""

import inspect
import re
from pathlib import Path

import blur_trainer as bt

#: what one wants to do -> the names for it, in reading order
TASKS = {
    "Unlearn your own data": [
        "unlearn",
        "Unlearned",
        "recommended",
        "read_rows",
        "ForgetEvaluation",
        "judge",
        "Verdict",
        "Thresholds",
    ],
    "Make a model forget": [
        *("BLURTrainer", "BLURConfig", "GradDiffTrainer", "GradDiffConfig", "UnlearningTrainer", "UnlearningConfig"),
        *("ULDTrainer", "ULDConfig", "task_vector", "TrainingInterrupted"),
    ],
    "Choose what to descend on the forget set": [
        *("NPO", "SimNPO", "DPO", "IDK", "GradAscent", "RMU", "AltPO"),
        *("WGA", "SatImp", "JensUn", "FLAT"),
        *("UNDIAL", "CEU", "Uniform", "ClampedEntropy", "Margin"),
        *("TargetLoss", "Until"),
    ],
    "Choose what to descend on the retain set": ["NLL", "KL", "JSD", "ActivationMatch"],
    "Choose how the two gradients meet": [
        *("BLUR", "Sum", "PCGrad", "MGDA", "NGDiff", "GRU", "Constrained", "PDU", "SAM"),
    ],
    "Load data": [
        "load_muse",
        "load_tofu",
        "load_wmdp",
        "load_wmdp_questions",
        "tokenize_dataset",
        "generate_alternatives",
        "replay",
        "general_text",
    ],
    "Measure": [
        *("MUSEEvaluation", "TOFUEvaluation", "RetainReference", "aggregate_log", "WMDPEvaluation", "LMEval"),
        "Level",
    ],
    "Attack": ["audit", "robustness", "relearn", "quantized", "prefixed", "LeakEvaluation", "leak_at_k"],
    "Look inside": ["probe_layers", "unlearning_depth"],
    "Show": [
        *("Results", "format_table", "write_report", "mean_and_spread"),
        *("ProgressBarCallback", "ReportCallback"),
    ],
    "Unlearn by logit difference": ["LogitDifferenceModel", "tune_weight", "paraphrases", "perturbed_answers"],
    "Plan and publish": ["estimate_memory", "recipe", "merge_and_save"],
    "Write one's own": [
        *("Objective", "Rule", "Evaluation", "GradientBackend"),
        *("forward", "answer_logps", "answer_token_logps"),
    ],
}
INTRO = """# Public names, by what one wants to do

[Back to the index](index.md). Generated from the docstrings by `python docs/generate_api.py`; `help(name)` shows the
whole text. All are attributes of `blur_trainer`, loaded when first used. What is not listed is reached through its
module, such as `blur_trainer.toy` (the invented world of the offline default) or `blur_trainer.data.tofu_templates`.
"""


def signature(thing: object) -> str:
    """`(model, args=..., *, rule=...)`: names, and which of them may be left out."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    shown, keyword = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword:
            shown.append("*")
            keyword = True
        name = {p.VAR_POSITIONAL: f"*{p.name}", p.VAR_KEYWORD: f"**{p.name}"}.get(p.kind, p.name)
        keyword = keyword or p.kind is p.VAR_POSITIONAL
        shown.append(name if p.default is p.empty else f"{name}=")
    return f"({', '.join(shown)})"


def summary(thing: object) -> str:
    """The first paragraph of the docstring, in one line."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0]
    text = re.sub(r"\[`~?(?:[\w.]*\.)?(\w+)`\](?!\()", r"`\1`", " ".join(paragraph.split()))
    return text.replace("|", "\\|")


def entry(name: str) -> str:
    thing = getattr(bt, name)
    if name in ("BLURTrainer", "GradDiffTrainer"):
        shown = "(...)"  # as `UnlearningTrainer`
    else:  # a configuration has all fields of TrainingArguments: its docstring lists those of its own
        shown = "" if name.endswith("Config") or name == "Rule" else signature(thing)
    return f"| `{name}{shown}` | {summary(thing)} |"


def page() -> str:
    parts = [INTRO]
    for task, names in TASKS.items():
        parts.append("\n".join([f"## {task}\n", "| name | what it does |", "|---|---|", *map(entry, names), ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), encoding="utf-8")
