"""Makes the assistant of ULD: the first layers of a model, over its own weights, with a LoRA to train."""

import copy

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from blur_trainer.models.reference import trains_beside_adapter
from blur_trainer.models.truncation import truncated_view

#: `init_lora_weights` that leave the weights below the adapter as they are
PLAIN_STARTS = (True, "gaussian", "eva", "orthogonal", "mica")


def lora_assistant(target: PreTrainedModel, num_layers: int, lora: LoraConfig | None = None) -> PeftModel:
    """
    The assistant of ULD: a [`truncated_view`] with LoRA. Only its adapter needs extra memory.

    This freezes the whole target.

    Args:
        target ([`~transformers.PreTrainedModel`]), num_layers (`int`):
            As for [`truncated_view`].
        lora ([`~peft.LoraConfig`], *optional*):
            Default: rank 16, alpha 32, dropout 0.05 on every linear layer but the head, as in ULD's code. Without
            dropout if the experts of a layer are one tensor: PEFT has none there.

    Raises:
        `ValueError`: the LoRA would train or change weights of the target.
    """
    if lora is not None and lora.init_lora_weights not in (*PLAIN_STARTS, False):
        raise ValueError(
            f"`init_lora_weights={lora.init_lora_weights!r}` changes the weights that the assistant shares with the "
            f"target: choose one of {', '.join(map(repr, PLAIN_STARTS))}."
        )
    dropout = 0.0 if _has_fused_experts(target) else 0.05
    lora = copy.deepcopy(lora) or LoraConfig(  # a copy, because PEFT writes the model's name into it
        r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    assistant = get_peft_model(truncated_view(target.requires_grad_(False), num_layers), lora)
    if beside := trains_beside_adapter(assistant):
        raise ValueError(
            f"The adapter trains weights that the assistant shares with the target ({', '.join(beside[:2])}), which "
            'would change it: give a LoRA with `bias="none"`.'
        )
    if not isinstance(assistant, PeftModel):  # for type checkers: PEFT may return a mixed model
        raise TypeError(f"get_peft_model made a `{type(assistant).__name__}` of `lora`; give a `LoraConfig`.")
    return assistant


def _has_fused_experts(model: nn.Module) -> bool:
    owners = (module for module in model.modules() if not isinstance(module, nn.Conv1d))
    return any(parameter.dim() == 3 for owner in owners for parameter in owner.parameters(recurse=False))
