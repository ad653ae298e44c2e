"""TOFU from the command line: its methods and arguments, their defaults, what each method trains on, tiny models."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from blur_trainer.data.tofu import TOFU_SPLITS, tofu_training_rows
from blur_trainer.data.tofu_templates import TOFU_TEMPLATES, apply_template
from blur_trainer.scripts import command_line
from blur_trainer.scripts.levels import HELP, check_level
from blur_trainer.scripts.methods import compared
from blur_trainer.scripts.tiny import memorized_models
from blur_trainer.scripts.tofu_methods import FORGET_ONLY, METHODS
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.uld.augment import paraphrases, perturbed_answers
from blur_trainer.uld.said import said_to_anything

TINY = {
    "output_dir": "outputs/tofu", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "num_train_epochs": 5,
    "per_device_train_batch_size": 8, "max_length": 256, "logging_steps": 5, "save_strategy": "no",
    "eval_strategy": "steps", "eval_steps": 0.25, "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
HUB = {
    "output_dir": "outputs/tofu", "max_length": 512, "num_train_epochs": 10, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
}  # fmt: skip


@dataclass
class TOFUArguments:
    """What to unlearn, how, and how it is judged."""

    method: str = field(
        default="blur-target",
        metadata={"choices": list(METHODS), "metavar": "METHOD", "help": f"How to unlearn: {', '.join(METHODS)}."},
    )
    recipe: str | None = field(
        default=None, metadata={"help": "Published settings, their method and model, e.g. open-unlearning."}
    )
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Further methods, with their default settings (default: blur-npo and uld, if tiny)."},
    )
    split: str = field(default="forget10", metadata={"choices": list(TOFU_SPLITS), "help": "Forget set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with TOFU's sets as JSON or JSONL."})
    max_rows: int | None = field(default=None, metadata={"help": "Use that many questions of each set only."})
    template: str = field(default="plain", metadata={"choices": list(TOFU_TEMPLATES), "help": "Prompt format."})
    protocol: str = field(
        default="tofu", metadata={"choices": ["tofu", "open-unlearning"], "help": "Whose conventions of measuring."}
    )
    said: int = field(
        default=0,
        metadata={"help": "uld: retain so many answers of the target to random questions (default: 576, if tiny)."},
    )
    level: str | None = field(
        default=None, metadata={"help": f"{HELP} Default, for target_loss: unseen, else retrained."}
    )
    retain_model: str | None = field(
        default=None, metadata={"help": "Model that never saw the forget set (default: open-unlearning's, or trained)."}
    )
    retain_log: str | None = field(default=None, metadata={"help": "Its published log instead, in TOFU's format."})
    augment_forget: str = field(
        default="columns", metadata={"choices": ["columns", "rules", "none"], "help": "uld: how to paraphrase."}
    )
    augment_retain: str = field(
        default="columns", metadata={"choices": ["columns", "rules", "none"], "help": "uld: how to find wrong answers."}
    )
    robustness: bool = field(
        default=False, metadata={"help": "Also attack the unlearned model: relearning, 8 and 4 bit, another prompt."}
    )
    models_dir: str = field(default="outputs/tofu-models", metadata={"help": "Where tiny models are kept."})


def parse(arguments: Sequence[str] | None = None) -> command_line.Parsed:
    """The script's, the trainer's and the model's arguments (of the command line); whether models are tiny."""
    script, args, model_args, tiny = command_line.parse(
        TOFUArguments,
        lambda script: METHODS[script.method].trainer.config_class,
        # what is asked with a wrong answer and with the right one begins alike: a tiny assistant cannot learn both
        lambda script, tiny: defaults(script.method, tiny) | ({"augment_retain": "none", "said": 576} if tiny else {}),
        lambda script, model_args: None if script.recipe is None else ("tofu", script.recipe),
        arguments,
    )
    check_level(script.level, args)
    if script.level and script.method == "uld":
        raise ValueError("--level is of what the model itself forgets, and ULD's model stays as it is: leave it out.")
    script.compare = compared(script, METHODS, ["blur-npo", "uld"] * tiny)
    return script, args, model_args, tiny


def defaults(method: str, tiny: bool) -> dict[str, Any]:
    """The settings of a method with tiny models, or with others."""
    return METHODS[method].defaults(tiny, TINY, HUB)


def configurations(script: TOFUArguments, args: Any, tiny: bool) -> dict[str, Any]:
    """Of the method, which the command line describes, and of those that it is compared with."""
    others = {name: METHODS[name].configure(defaults(name, tiny), args) for name in script.compare or ()}
    return {script.method: args, **others}


def training_sets(method: str, data: Mapping[str, Any], script: TOFUArguments) -> dict[str, Any]:
    """What a method trains on, as its trainer's arguments."""
    sets = {name: apply_template(data[name], script.template) for name in ("forget", "retain")}
    given = {"forget_dataset": sets["forget"], "retain_dataset": None if method in FORGET_ONLY else sets["retain"]}
    if method == "uld":
        for role, make in (("forget", paraphrases), ("retain", perturbed_answers)):
            by = getattr(script, f"augment_{role}")
            rows = data["forget_perturbed" if by == "columns" else "forget"]
            given[f"augment_{role}"] = "none" if by == "none" else apply_template(make(rows, by=by), script.template)
    return given


def with_said(sets: Mapping[str, Any], script: TOFUArguments, model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """ULD's training sets, with what the target says to random questions in the retain set."""
    rows = said_to_anything(model, tokenizer, script.said, seed=seed, batch_size=64)
    said = apply_template(rows, script.template)
    return {**sets, "retain_dataset": [*sets["retain_dataset"], *said]}


def tiny_models(data: Any, script: TOFUArguments) -> tuple[PreTrainedTokenizerBase, str, str]:
    """A tokenizer, and the names of two tiny models: one knows the data by heart, one all but the forget set."""
    groups = {"target": ["forget", "retain", "real_authors", "world_facts"]}
    groups["retain"] = groups["target"][1:]
    rows = {name: apply_template(tofu_training_rows(data, g), script.template) for name, g in groups.items()}
    texts = [row["prompt"] + row["completion"] for row in rows["target"]]
    tokenizer = train_tokenizer(texts)
    folder = Path(script.models_dir, f"{script.split}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}")
    target, retain = memorized_models({folder / name: known for name, known in rows.items()}, tokenizer, max_length=512)
    return tokenizer, target, retain
