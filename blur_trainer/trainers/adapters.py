"""Adapters of the trained model: whether training one is unlearning the model that was given."""

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from blur_trainer.models.forward import evaluating, forward
from blur_trainer.models.lora_assistant import PLAIN_STARTS
from blur_trainer.models.reference import REFERENCE_ADAPTER, is_partitioned

#: `init_lora_weights` that leave the model as it is, and that PEFT makes again, equal, when the adapter is loaded
STARTS = (*PLAIN_STARTS, "pissa", "olora")
_MERGE = (
    "save it (`model.save_pretrained('adapter')`), merge it into its base with `blur_trainer.merge_and_save('adapter', "
    "'merged')`, and pass 'merged' as `model`"
)


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: Any) -> PeftModel:
    """Wraps the model. Raises unless the wrapped model begins as the model itself."""
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `PeftConfig` such as `LoraConfig`, got {type(peft_config).__name__}.")
    if isinstance(model, PeftModel):
        raise ValueError(
            f"Got a `PeftModel` and a `peft_config`: pass one of them. To unlearn from the model with its adapter, "
            f"{_MERGE}."
        )
    if has_adapter(model):
        raise ValueError(
            "The model has an adapter already, which another one would replace: that would unlearn its base. Load the "
            f"adapter as a `PeftModel`, {_MERGE}."
        )
    check_method(peft_config)
    is_lora = isinstance(peft_config, LoraConfig)
    before = None if is_lora or is_partitioned(model) else _probe(model)
    adapted: Any = get_peft_model(model, peft_config)
    if before is not None and not _close(before, _probe(adapted)):
        adapted.unload()
        raise ValueError(
            f"A new `{type(peft_config).__name__}` changes the model at random before anything is trained: that would "
            "unlearn another model. Choose an initialization that changes nothing (`init_weights=True`), or LoRA."
        )
    return adapted


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether there are adapter layers in a model that is no `PeftModel`."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def check_method(config: PeftConfig) -> None:
    """Raises `ValueError` for a method or an initialization that trains another model than is given or saved."""
    if config.is_prompt_learning:
        raise ValueError(
            f"`{type(config).__name__}` puts trained tokens before each text: they change the model at random from the "
            "first step on, and whoever leaves them out has the old model. Use a `LoraConfig`."
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(config, LoraConfig) and start not in STARTS:
        why = "starts a random change of the model" if start is False else "changes the base weights as no loading does"
        raise ValueError(
            f"`init_lora_weights={start!r}` {why}: what is saved or merged would be another model than the trained "
            f"one. Choose one of {', '.join(map(repr, STARTS))}."
        )


def check_peft_model(model: PeftModel) -> None:
    """Raises `ValueError` unless exactly one adapter is active, switched on, not merged, and saved as it is trained."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The adapters {', '.join(model.active_adapters) or 'none'} are active, and exactly one can be trained: "
            "call `model.set_adapter(name)`."
        )
    name = model.active_adapters[0]
    if name == REFERENCE_ADAPTER:
        raise ValueError(f"The active adapter is named {name!r}, as the trainer's own copy is: choose another name.")
    config = model.peft_config[name]
    if getattr(config, "init_lora_weights", True) is not False:  # in a `PeftModel` it is over, and part of the model
        check_method(config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged into the weights and cannot train: call `model.unmerge_adapter()`.")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapter is switched off and cannot train: call `model.enable_adapter_layers()`.")


def remove_adapter(model: PeftModel) -> None:
    """Takes off an adapter that was just made, so that the user's model is as it was."""
    if model.peft_config[model.active_adapters[0]].is_prompt_learning:
        return  # it changed no module of the model
    moved = str(getattr(model.peft_config[model.active_adapters[0]], "init_lora_weights", "")) in ("pissa", "olora")
    model.merge_and_unload() if moved else model.unload()  # those two took their start off the weights


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    ids = torch.tensor([[0, 1, 2]], device=model.device)
    with evaluating(model):
        return forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _close(before: Tensor, after: Tensor) -> bool:
    """Equal up to rounding. (Weights that another process loads are not here yet, and may be NaN.)"""
    tolerance = 8 * torch.finfo(before.dtype).eps * before.abs().nan_to_num().max()
    return torch.allclose(before, after, rtol=0, atol=float(tolerance), equal_nan=True)
