"""Merges an adapter into its base model, so that serving needs no PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from blur_trainer.atomic_write import atomic_write
from blur_trainer.models.loading import check_place, load_pretrained
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

    Where the base ties its LM head to its embedding and the adapter is on either, the merged model has both weights.

    Args:
        adapter: folder or repository written by `save_model` of a PEFT training.
        output_dir: a new folder for weights (safetensors), configuration, tokenizer and model card.
        base_model: name, path or loaded model. Default: the model that the adapter was trained on.
        dtype: dtype of the loaded base. Default: the stored one.
        model_kwargs: arguments of `from_pretrained` of the base.

    Raises:
        `ValueError`: it is no adapter, it cannot be merged, or it was trained on another model than the base (resized
            after loading, say).
    """
    saving.check_output_dir(output_dir)
    if (Path(adapter) / saving.ASSISTANT).exists():
        raise ValueError(
            f"{adapter!r} is a model unlearned by logit difference: its assistant's logits are subtracted from the "
            "target's, which no weights can do. Load it with `AutoModelForCausalLM`."
        )
    config = _read_adapter(adapter)
    base = base_model or config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter in {adapter!r} does not say what model it was trained on: pass `base_model`, a name, a path "
            "or the loaded model."
        )
    if isinstance(base, str):
        base = _load_base(base, adapter, named=base_model is not None, kwargs={"dtype": dtype, **model_kwargs})
    if getattr(base, "is_quantized", False):
        raise ValueError("`base_model` is quantized: the adapter would be rounded away. Pass it unquantized.")
    merged = _merged(base, adapter)
    with saving.staged(output_dir, writes=True) as staging:
        merged.save_pretrained(staging)
        if (Path(adapter) / "tokenizer_config.json").exists():
            trust = {"trust_remote_code": model_kwargs.get("trust_remote_code", False)}
            AutoTokenizer.from_pretrained(adapter, **trust).save_pretrained(staging)
    card = Path(adapter) / "README.md"
    if card.exists():
        text = merged_card(card.read_text(encoding="utf-8"))
        atomic_write(Path(output_dir) / "README.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    return merged


def _read_adapter(adapter: str) -> PeftConfig:
    """Its configuration. Of a folder, or of a name that cannot be on the Hub, the Hub is not asked."""
    folder = Path(adapter)
    if not folder.is_dir():
        check_place(adapter, "adapter")
        if "/" not in adapter:  # the Hub has models without a user's name, of its own; adapters belong to users
            raise OSError(
                f"Cannot load adapter {adapter!r}: there is no folder {folder.absolute()}, and adapters on the Hub are "
                "`user/name`. Check the path."
            )
    elif not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{adapter!r} holds no adapter: no `{ADAPTER_CONFIG_NAME}` is there. Pass the output_dir of a training "
            "with `peft_config`; a full model needs no merging."
        )
    try:
        return PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        if folder.is_dir():
            raise ValueError(f"{adapter!r} has an `{ADAPTER_CONFIG_NAME}` that cannot be read. {error}") from error
        raise OSError(
            f"Cannot load adapter {adapter!r}: there is no such folder, and no such adapter was found on the Hub. "
            f"{error}"
        ) from error


def _load_base(base: str, adapter: str, named: bool, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        return load_pretrained(base, kwargs)
    except OSError as error:
        if named:
            raise
        raise OSError(
            f"{error} The adapter in {adapter!r} says that this is its base. If that is elsewhere, pass `base_model` "
            "(`--base_model`)."
        ) from error


def _merged(base: PreTrainedModel, adapter: str) -> PreTrainedModel:
    try:
        adapted: Any = PeftModel.from_pretrained(base, adapter, torch_device="cpu")  # not the first GPU
    except (RuntimeError, ValueError) as error:  # PEFT's, of sizes or of names
        raise ValueError(
            f"The adapter in {adapter!r} does not fit its base: it was trained on a model of other sizes or layers. "
            "Pass that one as `base_model`: loaded, and with `resize_token_embeddings` as before the training. "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(
            f"The adapter in {adapter!r} is of type {adapted.active_peft_config.peft_type.value}, which has no weights "
            "to add to the base's: keep adapter and base together."
        )
    untied = _untie(adapted)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"PEFT cannot merge the adapter in {adapter!r}: {' '.join(str(error).split())}") from error
    if untied:  # unless the adapter has tied them anew
        _say_tied(merged, merged.get_input_embeddings().weight is merged.get_output_embeddings().weight)
    return merged


def _untie(adapted: PeftModel) -> bool:
    """Gives the LM head a weight of its own if the adapter is on the embedding or the head: merging it into one weight
    would change both. Returns whether it did."""
    model: Any = adapted.get_base_model()
    wrapped = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    plain: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    embedding, head = (end.original_module if isinstance(end, AuxiliaryTrainingWrapper) else end for end in plain)
    if not any(isinstance(end, wrapped) for end in ends) or head is None or embedding.weight is not head.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    _say_tied(model, False)
    return True


def _say_tied(model: Any, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
