"""WMDP from the command line: its methods and arguments, their defaults, and the tiny models that know its topics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from blur_trainer.data.wmdp import load_wmdp
from blur_trainer.recipes import recipe
from blur_trainer.scripts import command_line
from blur_trainer.scripts.methods import SHARED, Method, compared
from blur_trainer.scripts.tiny import memorized_models
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.toy.wmdp import topic_lessons
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.grad_diff import GradDiffTrainer
from blur_trainer.trainers.unlearning import UnlearningTrainer

RMU, NPO = {"forget_objective": "rmu", "retain_objective": "activation_match"}, {"forget_objective": "npo"}
TINY_RMU = {  # layer 2 of 4, whose activations have norms of 70 to 90
    "forget_objective_kwargs": {"layer": 2, "coefficient": 10_000}, "retain_objective_kwargs": {"layer": 2},
}  # fmt: skip
TINY_NPO = {"forget_objective_kwargs": {"beta": 0.03}, "num_train_epochs": 5}
TINY_GRAD_DIFF = TINY_NPO | {"forget_objective_kwargs": {}, "forget_weight": 0.3}
METHODS = {
    "blur-rmu": Method("BLUR-RMU", BLURTrainer, RMU, TINY_RMU | {"alpha": 3_000}),
    "rmu": Method("RMU", UnlearningTrainer, RMU, TINY_RMU | {"retain_weight": 10_000}),
    "blur-npo": Method("BLUR-NPO", BLURTrainer, NPO, TINY_NPO | {"gamma": 0.1}),
    "npo": Method("NPO", UnlearningTrainer, NPO, TINY_NPO | {"forget_weight": 0.1}),
    "graddiff": Method("GradDiff", GradDiffTrainer, {}, TINY_GRAD_DIFF),
}
TINY = {
    "output_dir": "outputs/wmdp", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "num_train_epochs": 20,
    "per_device_train_batch_size": 8, "max_length": 256, "logging_steps": 10, "save_strategy": "no",
    "eval_strategy": "steps", "eval_steps": 0.2, "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
HUB = {
    "output_dir": "outputs/wmdp", "per_device_train_batch_size": 4, "max_length": 512, "lr_scheduler_type": "constant",
}  # fmt: skip
PUBLISHED = {"blur-rmu": "paper", "rmu": "rmu", "blur-npo": "blur-npo"}  # which recipe a method has: docs/recipes.md


@dataclass
class WMDPArguments:
    """What to unlearn, how, and how it is judged."""

    method: str = field(default="blur-rmu", metadata={"choices": list(METHODS), "help": "How to unlearn."})
    compare: list[str] | None = field(
        default=None, metadata={"help": "Further methods, with their default settings (default: rmu, if tiny)."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": "Published settings, or none (default: of the method, if the model is real)."}
    )
    forget_topics: list[str] | None = field(
        default=None, metadata={"help": "bio, cyber (default: both); of the invented ones potions, machines."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with WMDP's corpora; the rest from the Hub."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "lm-eval tasks (default: wmdp_bio, wmdp_cyber, mmlu; tiny: none, same number)."}
    )
    tasks_dir: str | None = field(default=None, metadata={"help": "Folder with lm-eval tasks of your own."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many questions of each lm-eval task."})
    robustness: bool = field(
        default=True, metadata={"help": "Attack the unlearned model: relearning, rounded weights (needs it whole)."}
    )
    models_dir: str = field(default="outputs/wmdp-models", metadata={"help": "Where the tiny model is kept."})


def parse(arguments: Sequence[str] | None = None) -> command_line.Parsed:
    """The script's, the trainer's and the model's arguments (of the command line); whether models are tiny."""
    script, args, model_args, tiny = command_line.parse(
        WMDPArguments,
        lambda script: METHODS[script.method].trainer.config_class,
        lambda script, tiny: {**defaults(script.method, tiny), "recipe": _recipe(script, tiny), "robustness": tiny},
        _find_recipe,
        arguments,
    )
    if tiny and script.data_dir:
        raise ValueError("--data_dir is for a real model: pass --model_name_or_path too.")
    if (
        script.recipe not in (None, "none") and args.topics and script.forget_topics
    ):  # a recipe has settings of all topics
        args.topics = {topic: own for topic, own in args.topics.items() if topic in script.forget_topics}
    script.compare = compared(script, METHODS, ["rmu"] * tiny)
    return script, args, model_args, tiny


def _recipe(script: WMDPArguments, tiny: bool) -> str | None:
    return script.recipe or (None if tiny else PUBLISHED.get(script.method))


def _find_recipe(script: WMDPArguments, model_args: ModelConfig) -> tuple[str, str] | None:
    name = _recipe(script, tiny=model_args.model_name_or_path is None)
    return None if name is None or name == "none" else ("wmdp", name)


def defaults(method: str, tiny: bool) -> dict[str, Any]:
    """The settings of a method with tiny models, or with others."""
    return METHODS[method].defaults(tiny, TINY, HUB)


def configurations(script: WMDPArguments, args: Any, tiny: bool) -> dict[str, Any]:
    """Of the method, which the command line describes, and of those that it is compared with."""
    return {script.method: args, **{name: _configure(name, script, args, tiny) for name in script.compare or ()}}


def _configure(method: str, script: WMDPArguments, args: Any, tiny: bool) -> Any:
    """A real model's methods have their published settings; else the layer, where the chosen method has one too."""
    own = defaults(method, tiny)
    if not tiny and script.recipe != "none" and method in PUBLISHED:
        own |= recipe("wmdp", PUBLISHED[method])["arguments"]
    elif not tiny and args.forget_objective == own.get("forget_objective"):
        own |= {name: getattr(args, name) for name in ("forget_objective_kwargs", "retain_objective_kwargs", "topics")}
    if own.get("topics") and args.topics:
        own["topics"] = {topic: each for topic, each in own["topics"].items() if topic in args.topics}
    return METHODS[method].configure(own, args, (*SHARED, "deepspeed", "train_layers", "train_parameters"))


def tiny_models(script: WMDPArguments, topics: Iterable[str]) -> tuple[PreTrainedTokenizerBase, str, str]:
    """A tokenizer, and the names of two tiny models: one knows all invented topics by heart, one what is to be kept."""
    sheets = [text for rows in load_wmdp(corpus="embedded").values() for text in rows["text"]]
    tokenizer = train_tokenizer([*sheets, *(row["prompt"] + row["completion"] for row in topic_lessons())])
    kept = [topic for topic in ("potions", "machines", "dishes") if topic not in topics]
    lessons = {"target": topic_lessons(), f"retrain-{'-'.join(kept)}": topic_lessons(kept)}
    known = {Path(script.models_dir, name): rows for name, rows in lessons.items()}
    target, retrained = memorized_models(known, tokenizer, max_length=256)
    return tokenizer, target, retrained
