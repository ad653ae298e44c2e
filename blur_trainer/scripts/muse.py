"""MUSE from the command line: its arguments, their defaults, and the tiny models that know its texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from blur_trainer.scripts import command_line
from blur_trainer.scripts.tiny import memorized_models
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.toy.muse import training_texts
from blur_trainer.trainers.blur import BLURConfig

TINY = {  # for a Llama of 1M parameters that knows its texts by heart; docs/quickstart.md has the settings of a 7B
    "output_dir": "outputs/muse", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "num_train_epochs": 10,
    "per_device_train_batch_size": 8, "gamma": 0.1, "forget_objective_kwargs": '{"beta": 0.03}', "max_length": 2048,
    "precompute_ref_logps": True, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 14,
    "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
HUB = {"output_dir": "outputs/muse", "max_length": 2048, "baseline": False}


@dataclass
class MUSEArguments:
    """What to unlearn, and by which protocol."""

    corpus: str = field(default="embedded", metadata={"choices": ["embedded", "news", "books"], "help": "MUSE corpus."})
    recipe: str | None = field(default=None, metadata={"help": "Published settings and their model, e.g. paper."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the corpus' splits as JSON or JSONL."})
    max_documents: int | None = field(default=None, metadata={"help": "Use that many documents of each group only."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, where the model has none beside it."})
    sequence: bool = field(default=False, metadata={"help": "Protocol `sust`: the forget sets one after another."})
    scale: bool = field(default=False, metadata={"help": "Protocol `scal`: forget sets of growing size, each anew."})
    baseline: bool = field(
        default=True, metadata={"help": "Also run the weighted sum of the same strength (default: with tiny models)."}
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
        MUSEArguments, lambda script: BLURConfig, lambda script, tiny: TINY if tiny else HUB, _recipe, arguments
    )
    if script.sequence and script.scale:
        raise ValueError("--sequence and --scale are two protocols: pass one of them.")
    return script, args, model_args, tiny


def _recipe(script: MUSEArguments, model_args: ModelConfig) -> tuple[str, str] | None:
    if script.recipe is None:
        return None
    if script.corpus == "embedded":
        raise ValueError("--recipe is for the published models: pass --corpus news or --corpus books.")
    return f"muse-{script.corpus}", script.recipe


def tiny_models(data: DatasetDict, folder: Path) -> tuple[PreTrainedTokenizerBase, str, str]:
    """A tokenizer, and the names of two tiny models: one knows all texts by heart, one all but the forget set."""
    tokenizer = train_tokenizer(training_texts(data)["text"])
    groups = {"target": ["forget", "retain", "hold"], "retrain": ["retain", "hold"]}
    known: dict[Path, Any] = {folder / name: training_texts(data, group) for name, group in groups.items()}
    target, retrain = memorized_models(known, tokenizer, max_length=2048)
    return tokenizer, target, retrain
