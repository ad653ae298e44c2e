"""Which of TOFU's metrics some data allows, and how a table shows them."""

from collections.abc import Mapping

from blur_trainer.evaluation.base import Column
from blur_trainer.evaluation.tofu.examples import CHOICES, SPLITS, Questions
from blur_trainer.evaluation.tofu.reference import RetainReference

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
NAMES = {"forget": "forget", "retain": "retain", "real_authors": "real authors", "world_facts": "world facts"}
LABELS = {"probability": "Prob.", "rouge": "ROUGE", "truth_ratio": "TR"}
OTHERS = {
    "model_utility": ("Model utility", "max"),
    "forget_quality": ("Forget quality", "max"),
    "forget_exact_memorization": ("Exact mem.", "min"),
    "forget_extraction_strength": ("Extraction", "min"),
    "privleak": ("PrivLeak", "zero"),
}


def metric_keys(
    splits: Mapping[str, Questions], *, reference: RetainReference | None, gradnorm: bool, by_reference: bool
) -> list[str]:
    """Keys in the order of the tables; raises where an argument asks for what the splits cannot give."""
    keys: list[str] = []
    for group, split in splits.items():
        if group == "holdout":
            continue
        if group not in CHOICES or split.perturbed:
            keys.append(f"{group}_probability")
        keys.append(f"{group}_rouge")
        if split.perturbed and (split.paraphrased or group in CHOICES):
            keys.append(f"{group}_truth_ratio")
    if all(f"{group}_{metric}" in keys for group in ("retain", *CHOICES) for metric in LABELS):
        keys.append("model_utility")
    if reference is not None:
        _check_reference(reference, splits, "forget_truth_ratio" in keys)
        keys += ["forget_quality", "forget_quality_log10"]
    if "forget" in splits:
        keys += ["forget_exact_memorization", "forget_extraction_strength"]
    asked = {"gradnorm": gradnorm, "reference_model": by_reference}
    if "holdout" not in splits:
        for argument in (name for name, given in asked.items() if given):
            raise ValueError(f"`{argument}` needs the split `{SPLITS['holdout']}`: add it to `data`, or leave it out.")
        return keys
    if "forget" not in splits:
        raise ValueError(f"The split `{SPLITS['holdout']}` is compared with `{SPLITS['forget']}`, which `data` lacks.")
    keys += [f"mia_{attack}" for attack in ATTACKS]
    keys += ["mia_gradnorm"] if gradnorm else []
    keys += ["mia_reference"] if by_reference else []
    return keys + (["privleak"] if reference is not None and reference.min_k_auc is not None else [])


def column_of(key: str) -> Column:
    """`name`, `label` and `goal`."""
    if key in OTHERS:
        label, goal = OTHERS[key]
        return {"name": key, "label": label, "goal": goal}
    group = next(name for name in NAMES if key.startswith(f"{name}_"))
    metric = key.removeprefix(f"{group}_")
    goal = "min" if group == "forget" and metric != "truth_ratio" else "max"
    return {"name": key, "label": f"{LABELS[metric]} {NAMES[group]}", "goal": goal}


def _check_reference(reference: RetainReference, splits: Mapping[str, Questions], has_ratios: bool) -> None:
    if not has_ratios:
        raise ValueError(
            f"`reference` needs the split `{SPLITS['forget']}` with `paraphrased_answer` and `perturbed_answer`: the "
            "forget quality compares truth ratios."
        )
    theirs, ours = len(reference.truth_ratios), len(splits["forget"].prompts)
    if theirs != ours:
        raise ValueError(
            f"`reference` has {theirs} truth ratios, the forget split {ours} questions: both models must be asked the "
            "same questions under the same protocol."
        )
