"""The methods that a command line can choose among and compare: a trainer and its settings, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import TrainingArguments

from blur_trainer.trainers.unlearning import UnlearningTrainer

# what a method that the command line does not describe has in common with the one that it does
SHARED = (
    *("output_dir", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("max_steps", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm", "bf16", "fp16", "use_cpu"),
    *("eval_strategy", "eval_steps", "report_to", "resume_from_checkpoint"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "fused_lm_head"),
)


def changed(args: Any, **changes: Any) -> Any:
    """A copy of the arguments with these changes. It remembers which settings were left to the device."""
    copied = replace(args, **changes)
    copied.by_device = args.by_device
    return copied


class Method(NamedTuple):
    """One way to unlearn, as `--method` and `--compare` name it."""

    label: str  # in tables
    trainer: type[UnlearningTrainer]
    settings: dict[str, Any]  # what makes it the method
    tiny: dict[str, Any]  # what suits a tiny Llama that knows its texts by heart

    def defaults(self, tiny: bool, of_tiny: Mapping[str, Any], of_real: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings with tiny or real models; `of_tiny` and `of_real` are those of all methods."""
        return {**(of_tiny if tiny else of_real), **(self.tiny if tiny else {}), **self.settings}

    def configure(self, defaults: Mapping[str, Any], args: Any, shared: Sequence[str] = SHARED) -> TrainingArguments:
        """Its configuration where the command line describes another method: for the same machine, seed and length."""
        taken = {name: getattr(args, name) for name in shared}
        config = self.trainer.config_class(**{**defaults, **taken, **self.settings})
        config.by_device = args.by_device
        return config


def compared(script: Any, methods: Mapping[str, Method], default: Sequence[str]) -> list[str]:
    """The methods to compare the chosen one with; `--compare none` is nothing."""
    asked = default if script.compare is None else script.compare
    others = [name for name in asked if name != script.method and name != "none"]
    if unknown := set(others) - set(methods):
        raise ValueError(f"--compare {sorted(unknown)}: choose among {list(methods)}, or none.")
    return others
