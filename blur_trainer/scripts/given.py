"""What the steps of a benchmark's run share."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from blur_trainer.scripts.command_line import Parsed
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.running import begin


class Given(NamedTuple):
    """The arguments of the benchmark, of the trainer and of the model; whether models are tiny; the output folder."""

    script: Any
    args: Any
    model_args: ModelConfig
    tiny: bool
    out: Path
    load: ModelLoader


class Models(NamedTuple):
    """The names of the models: one knows all, one never saw what is to be forgotten; there may be none of these."""

    tokenizer: PreTrainedTokenizerBase
    target: str
    retrained: str | None


def given_by(parsed: Parsed) -> Given:
    """The same, with the folder of a run that begins. Raises as [`~blur_trainer.scripts.running.begin`]."""
    script, args, model_args, _ = parsed
    return Given(*parsed, begin(script, args, model_args), ModelLoader(args, model_args))


def of_tiny(given: Given, models: Models) -> dict[str, Any]:
    """How tiny models are attacked: at a lower rate, and beside the retrained one, which learns anew."""
    if not given.tiny or models.retrained is None:
        return {}
    return {
        "learning_rate": given.args.learning_rate / 10,
        "retrained": given.load(models.retrained, to_train=True),
    }
