"""Reads the folder of a logit-difference model for vLLM: where its tensors are, what is refused. Needs no vLLM."""

from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from blur_trainer.models.logit_composition import check_composition
from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.named_model import adapter_inside, own_folder
from blur_trainer.models.origin import Place, find

LOAD_FORMATS = ("auto", "hf", "safetensors")


class Tensors(NamedTuple):
    """Where a loader finds them: `adapter` is a path within the folder, `target` a folder or hub id."""

    lora: LoraConfig
    adapter: str
    target: Place


def tensors_of(name: str, revision: str | None, config: LogitDifferenceConfig) -> Tensors:
    """
    Args:
        name, revision: folder or hub id of the logit-difference model.
        config: its configuration.

    Raises:
        `FileNotFoundError`: target or adapter are not there.
        `ValueError`: the target is not the one that the configuration has recorded.
    """
    folder = own_folder(name, **({"revision": revision} if revision else {}))
    inside = adapter_inside(folder)
    adapter = "/".join(filter(None, (inside, ADAPTER_SAFE_WEIGHTS_NAME)))
    beside = folder if Path(name).is_dir() else None
    target = find(str(config.target), (config.origins or {}).get(str(config.target)), beside, "target")
    return Tensors(LoraConfig.from_pretrained(str(folder / (inside or ""))), adapter, target)


def check_served(config: LogitDifferenceConfig, load_format: str, quantized: bool) -> None:
    """Raises `ValueError` if the model is one that this package does not serve by vLLM, and says what to do."""
    # the command line may have set them after `config.json` was read
    check_composition(float(config.weight or 0), float(config.top_logit_filter or 0))
    if config.target is None or not config.num_assistant_layers or config.text_config is None:
        raise ValueError(f"config.json names no target (target={config.target!r}): write its folder or hub id there.")
    if config.assistant is not None:
        raise ValueError(f"The assistant is over another model ({config.assistant!r}): serve this one by transformers.")
    if quantized:
        raise ValueError("quantization is not supported for a logit-difference model: leave it out.")
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r}: a logit-difference model is loaded by one of {LOAD_FORMATS}.")
