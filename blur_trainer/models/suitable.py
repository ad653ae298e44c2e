"""Whether a model is one that this package can unlearn: a causal language model, decoder only, with its head."""

from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from blur_trainer.models.forward import causal_lm

_WANTED = (
    "needed is a decoder-only causal language model with its LM head, as `AutoModelForCausalLM` loads it (Llama, "
    "Mistral, Qwen, GPT-NeoX and the like)."
)


def check_config(config: PreTrainedConfig, what: str) -> None:
    """Raises `ValueError` for an encoder-decoder. `AutoModelForCausalLM` would load only the decoder of some."""
    if config.is_encoder_decoder:
        raise ValueError(f"{what} (`{type(config).__name__}`) is an encoder-decoder: {_WANTED}")


def check_loadable(config: PreTrainedConfig, what: str) -> None:
    """Raises `ValueError` if `AutoModelForCausalLM` loads nothing, or only a part of the model, for this `config`."""
    check_config(config, what)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise ValueError(f"{what} (`{type(config).__name__}`) is no language model: {_WANTED}")


def check_causal_lm(model: nn.Module, what: str) -> None:
    """Raises `ValueError` unless the model gives logits of the next token from the tokens before. Runs nothing.

    `what` names the argument in the message.
    """
    lm: Any = causal_lm(model)
    name = f"{what} (`{type(lm).__name__}`)"
    check_config(lm.config, what)
    if not lm.can_generate():
        raise ValueError(f"{name} has no LM head, so it gives no logits of the next token: {_WANTED}")
    directions = [module.is_causal for module in lm.modules() if hasattr(module, "is_causal")]
    if directions and not any(directions):
        raise ValueError(
            f"{name} attends to the tokens that it shall predict (an encoder, or `is_decoder=False`): {_WANTED}"
        )
