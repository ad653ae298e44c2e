"""Merges an adapter into its base model, so that serving needs no PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from blur_trainer.atomic_write import atomic_write
from blur_trainer.models.loading import load_pretrained
from blur_trainer.report.model_card import merged_card
from blur_trainer.saving import output_dir as saving


def merge_and_save(
    adapter: str,
    output_dir: str,
    *,
    base_model: str | PreTrainedModel | None = None,
    dtype: str | torch.dtype = "auto",
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Adds a trained adapter to its base model's weights, `W + (alpha/r) B A` for LoRA, and saves the whole model.

    The base is loaded unquantized, even if the adapter was trained on a 4-bit one (QLoRA): 4-bit rounding would remove
    small updates. For one process. It runs on the CPU unless `device_map` says otherwise.

    Args:
        adapter: folder or repository written by `save_model` of a PEFT training.
        output_dir: a new folder for weights (safetensors), configuration, tokenizer and model card.
        base_model: name, path or loaded model. Default: the model that the adapter was trained on.
        dtype: dtype of the loaded base. Default: the stored one.
        model_kwargs: arguments of `from_pretrained` of the base.
    """
    saving.check_output_dir(output_dir)
    if (Path(adapter) / saving.ASSISTANT).exists():
        raise ValueError(
            f"{adapter!r} is a model unlearned by logit difference: its assistant's logits are subtracted from the "
            "target's, which no weights can do. Load it with `AutoModelForCausalLM`."
        )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        raise ValueError(
            f"{adapter!r} holds no adapter: no `adapter_config.json` is there. Pass the output_dir of a training with "
            f"`peft_config`; a full model needs no merging. {error}"
        ) from error
    base = base_model or config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter in {adapter!r} does not say what model it was trained on: pass `base_model`, a name, a path "
            "or the loaded model."
        )
    if isinstance(base, str):
        base = load_pretrained(base, {"dtype": dtype, **model_kwargs})
    if getattr(base, "is_quantized", False):
        raise ValueError("`base_model` is quantized: the adapter would be rounded away. Pass it unquantized.")
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
    with saving.staged(output_dir, writes=True) as staging:
        merged.save_pretrained(staging)
        if (Path(adapter) / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(adapter).save_pretrained(staging)
    card = Path(adapter) / "README.md"
    if card.exists():
        text = merged_card(card.read_text(encoding="utf-8"))
        atomic_write(Path(output_dir) / "README.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    return merged
