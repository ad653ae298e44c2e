"""`blur-trainer estimate`: the memory per GPU of a training, from the model's structure. No weights are loaded."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, get_peft_config

from blur_trainer.cli.options import help_text, options_of
from blur_trainer.cli.outcome import outcome
from blur_trainer.memory.estimate import estimate_memory
from blur_trainer.pipeline.sets import made
from blur_trainer.trainers.blur import BLURConfig

_USAGE = """blur-trainer estimate --model_name_or_path MODEL [--gpus N] [--sharding zero3]
                             [any setting of the training]"""


@dataclass
class EstimateArguments:
    """What is asked."""

    gpus: int = field(default=1, metadata={"help": "Processes, one per GPU."})
    sharding: str | None = field(
        default=None, metadata={"help": "none, zero0 to zero3, fsdp, or zero1_offload to zero3_offload."}
    )
    bits: int | None = field(default=None, metadata={"help": "4 or 8, for a base model quantized by bitsandbytes."})


_CLASSES = (EstimateArguments, BLURConfig, ModelConfig)


def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text([EstimateArguments], "estimate", _USAGE, "--help-all: all settings."))
        return 0
    if "--help-all" in arguments:
        sys.stdout.write(help_text(_CLASSES, "estimate", _USAGE, ""))
        return 0
    with outcome("estimate") as done:
        given = options_of(_CLASSES, arguments, "estimate")
        if "model_name_or_path" not in given:
            raise ValueError("`model_name_or_path` is missing: name the model.")
        script, args, model_args = (made(of, {"output_dir": "unlearned", "dtype": None} | given) for of in _CLASSES)
        options: dict[str, Any] = {"sharding": script.sharding, "bits": script.bits, "dtype": model_args.dtype}
        peft_config = get_peft_config(model_args)
        found = estimate_memory(
            str(model_args.model_name_or_path), args, script.gpus, peft_config=peft_config, **options
        )
        done.say(found)
    return done.code
