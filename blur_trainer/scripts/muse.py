"""MUSE from the command line: its arguments, their defaults, and the tiny models that know its texts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from blur_trainer.scripts import command_line
from blur_trainer.scripts.levels import HELP, check_level
from blur_trainer.scripts.tiny import memorized_models
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.toy.muse import training_texts
from blur_trainer.trainers.blur import BLURConfig

_TINY = {  # for a Llama of 1M parameters that knows its texts by heart; docs/quickstart.md has the settings of a 7B
    "output_dir": "outputs/muse", "per_device_train_batch_size": 8, "max_length": 2048, "logging_steps": 5,
    "eval_strategy": "steps", "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
TINY = _TINY | {
    "forget_objective": "target_loss", "forget_objective_kwargs": {"two_sided": True}, "gamma": 0.15,
    "retain_objective": "kl", "replay": 2048, "learning_rate": 5e-4, "lr_scheduler_type": "linear",
    "num_train_epochs": 30, "eval_steps": 42,
}  # fmt: skip
#: BLUR as published: NPO without an end. All that makes it the method, whatever the command line says of another
PUBLISHED = {
    "rule": "blur", "rule_kwargs": None, "alpha": 1.0, "lower_level": "forget", "clamp": False,
    "forget_level": None, "stop_at_level": False, "retain_bound": None,
    "replay_kwargs": None, "retain_set_weights": None, "retain_objective_kwargs": None, "sam_rho": None,
    "mask_share": None,
    "forget_objective": "npo", "forget_objective_kwargs": {"beta": 0.03}, "precompute_ref_logps": True, "gamma": 0.1,
    "retain_objective": "nll", "replay": None, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
    "num_train_epochs": 10, "eval_steps": 14,
}  # fmt: skip
_OF_METHOD = {"--forget_objective": "forget_objective_kwargs", "--rule": "gamma"}
HUB = {"output_dir": "outputs/muse", "max_length": 2048, "baseline": False}


@dataclass
class MUSEArguments:
    """What to unlearn, and by which protocol."""

    corpus: str = field(default="embedded", metadata={"choices": ["embedded", "news", "books"], "help": "MUSE corpus."})
    recipe: str | None = field(
        default=None, metadata={"help": "Published settings and their model, e.g. paper (embedded: BLUR-NPO)."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the corpus' splits as JSON or JSONL."})
    max_documents: int | None = field(default=None, metadata={"help": "Use that many documents of each group only."})
    level: str | None = field(
        default=None,
        metadata={"help": f"{HELP} Default, for target_loss: retrained with tiny models, else unseen."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, where the model has none beside it."})
    sequence: bool = field(default=False, metadata={"help": "Protocol `sust`: the forget sets one after another."})
    scale: bool = field(default=False, metadata={"help": "Protocol `scal`: forget sets of growing size, each anew."})
    baseline: bool = field(
        default=True, metadata={"help": "Also run BLUR-NPO as published (default: with tiny models)."}
    )
    robustness: bool = field(
        default=False, metadata={"help": "Also attack the unlearned model: relearning, 8 and 4 bit, another prompt."}
    )

    @property
    def protocol(self) -> str | None:
        """Which of MUSE's protocols has several forget sets; `None` for one set, all of it at once."""
        return "sust" if self.sequence else "scal" if self.scale else None


def parse(arguments: Sequence[str] | None = None) -> command_line.Parsed:
    """The script's, the trainer's and the model's arguments (of the command line); whether models are tiny."""
    script, args, model_args, tiny = command_line.parse(
        MUSEArguments, lambda script: BLURConfig, partial(_defaults, arguments), _recipe, arguments
    )
    check_level(script.level, args)
    if script.level == "retrained" and not tiny:
        raise ValueError("--level retrained is for the tiny models: pass --level unseen, or nats per token.")
    if script.baseline and not tiny:
        raise ValueError("--baseline is for the tiny models: of published ones, run --recipe paper by itself.")
    if script.sequence and script.scale:
        raise ValueError("--sequence and --scale are two protocols: pass one of them.")
    return script, args, model_args, tiny


def _defaults(arguments: Sequence[str] | None, script: MUSEArguments, tiny: bool) -> dict[str, Any]:
    """Those of a method are left out where the command line names another objective or rule."""
    if not tiny:
        return HUB
    chosen = _TINY | PUBLISHED if script.recipe == "paper" else TINY
    flags = {word.partition("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)}
    others = {of for flag, of in _OF_METHOD.items() if flag in flags}
    return {name: value for name, value in chosen.items() if name not in others}


def _recipe(script: MUSEArguments, model_args: ModelConfig) -> tuple[str, str] | None:
    if script.recipe is None:
        return None
    if script.corpus == "embedded":
        if script.recipe != "paper" or model_args.model_name_or_path is not None:
            raise ValueError(
                "--recipe is for the published models: pass --corpus news or --corpus books. On the embedded corpora, "
                "with tiny models, there is --recipe paper."
            )
        return None  # the paper's method, with settings for tiny models
    return f"muse-{script.corpus}", script.recipe


def check_resuming(args: BLURConfig, out: Path) -> None:
    """Raises `ValueError` if the run is to go on and no training of one has begun: the folder may be misspelled."""
    begun = any(path for name in ("checkpoint-*", "trainer_state.json") for path in out.rglob(name))
    if args.resume_from_checkpoint and not begun:
        raise ValueError(f"output_dir {str(out)!r} holds no checkpoint: leave --resume_from_checkpoint out.")


def tiny_models(data: DatasetDict, folder: Path) -> tuple[PreTrainedTokenizerBase, str, str]:
    """A tokenizer, and the names of two tiny models: one knows all texts by heart, one all but the forget set."""
    tokenizer = train_tokenizer(training_texts(data)["text"])
    groups = {"target": ["forget", "retain", "hold"], "retrain": ["retain", "hold"]}
    known: dict[Path, Any] = {folder / name: training_texts(data, group) for name, group in groups.items()}
    target, retrain = memorized_models(known, tokenizer, max_length=2048)
    return tokenizer, target, retrain


def label_of(args: BLURConfig) -> str:
    """The name of the method in tables: rule and forget objective."""
    objective = {"target_loss": "Target"}.get(args.forget_objective, args.forget_objective.upper())
    return f"{args.rule.upper()}-{objective}"
