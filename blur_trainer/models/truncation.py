"""Makes a model of the first layers of a causal language model. It shares every Parameter, so nothing is copied.

The layers are found by the model's structure, not by the name of its architecture.
"""

import copy
import inspect
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blur_trainer.models.layer_lists import layer_lists

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


def truncated_view(target: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """
    The target's embedding, first `num_layers` layers, final norm and head, as new modules over the **same** Parameters.

    Changes to modules (adapters, hooks, `train`) affect one of the two models. Changes to Parameters (values,
    `requires_grad`, `.to(dtype)`) affect both.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            A decoder-only model with an LM head, not wrapped.
        num_layers (`int`):
            From 1 up to the number of the target's layers.

    Raises:
        `TypeError`: the target is no `PreTrainedModel`, or its layers are not found or not supported.
        `ValueError`: it has fewer than `num_layers` layers.
    """
    return _truncated(target, num_layers, list(target.parameters()))


def frozen_lower(target: PreTrainedModel, num_layers: int, share: bool) -> PreTrainedModel:
    """
    A frozen model of the first `num_layers` layers, with embedding, norm and head. Training the target does not change
    it.

    Args:
        target, num_layers: as for [`truncated_view`].
        share: share the target's frozen parameters instead of copying them. Then only the trained parameters among
            these layers, the embedding and the head need extra memory. (Not possible with an engine that shards,
            because it replaces parameters.)
    """
    shared = [parameter for parameter in target.parameters() if share and not parameter.requires_grad]
    return _truncated(target, num_layers, shared).requires_grad_(False).eval()


def _truncated(target: PreTrainedModel, num_layers: int, shared: list[nn.Parameter]) -> PreTrainedModel:
    layers = decoder_layers(target)
    _check_number(num_layers, len(layers))
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    # deepcopy reuses what it finds in the memo: here the short list instead of the whole one.
    memo[id(layers)] = copy.deepcopy(layers[:num_layers], memo)
    view = copy.deepcopy(target, memo)
    for config in {id(m.config): m.config for m in view.modules() if isinstance(m, PreTrainedModel)}.values():
        _shorten(config, num_layers)
    return view


def shortened(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The configuration for loading only the first layers. Raises `ValueError` if the model has fewer."""
    _check_number(num_layers, count_layers(config))
    config = copy.deepcopy(config)
    _shorten(config, num_layers)
    return config


def _check_number(num_layers: int, count: int) -> None:
    if not 1 <= num_layers <= count:
        raise ValueError(f"num_layers={num_layers}: the model has {count} layers; give 1 to {count}.")


def quarter(config: PreTrainedConfig) -> int:
    """Default number of layers of ULD's assistant: a quarter of the target's (8 of 32, as in its code), at least 1."""
    return max(1, round(count_layers(config) / 4))


def count_layers(config: PreTrainedConfig) -> int:
    """`num_hidden_layers`. Raises `TypeError` if there is none, or if the model has an encoder."""
    count = getattr(config, "num_hidden_layers", None)
    if count is None or config.is_encoder_decoder:
        raise TypeError(f"`{type(config).__name__}` is of no decoder-only model with `num_hidden_layers`: pass one.")
    return count


def _shorten(config: object, num_layers: int) -> None:
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = num_layers  # type: ignore[attr-defined]
    if kinds is not None:  # one kind per layer; caches are made from this list
        config.layer_types = list(kinds[:num_layers])  # type: ignore[attr-defined]


def decoder_layers(target: PreTrainedModel) -> nn.ModuleList:
    """The target's only module list with one module per layer. `TypeError` says what is wrong."""
    obstacle = _obstacle(target)
    if obstacle:
        raise TypeError(
            f"`{type(target).__name__}` cannot be truncated: {obstacle}. What is needed is a decoder-only "
            "`PreTrainedModel` (Llama, Mistral, Qwen2, GPT-NeoX and the like), merged with its adapters if it had any."
        )
    return layer_lists(target)[0]


def _obstacle(target: PreTrainedModel) -> str | None:
    if not isinstance(target, PreTrainedModel):
        return "it is no `PreTrainedModel`"
    config = target.config
    if config.is_encoder_decoder:
        return "it has an encoder"
    if config.get_text_config(decoder=True) is not config:
        return "it is made of several models, each with a configuration of its own"
    if target.base_model is target or target.get_output_embeddings() is None:
        return "it has no backbone (`base_model`) below an LM head (`get_output_embeddings`)"
    missing = [name for name in INPUTS if name not in inspect.signature(type(target).forward).parameters]
    if missing:
        return f"its `forward` does not take {', '.join(f'`{name}`' for name in missing)}"
    if not hasattr(config, "num_hidden_layers") or len(layer_lists(target)) != 1:
        return "its backbone does not have exactly one `ModuleList` of `config.num_hidden_layers` layers"
    strange = {
        type(layer).__name__ for layer in DynamicCache(config=config).layers if not isinstance(layer, DynamicLayer)
    }
    if strange:
        return f"its cache holds more than keys and values ({', '.join(sorted(strange))})"
    return None


def without_adapter(assistant: PeftModel) -> PreTrainedModel:
    """
    The model below a LoRA without the adapter: new modules over the **same** Parameters, in `eval` mode.

    Unlike `disable_adapter` it needs no switching at each token, and both models can hold a cache.

    Raises:
        `ValueError`: the adapter trains the model's own weights, so the original weights are lost.
    """
    config = assistant.active_peft_config
    own = [x for x in ("modules_to_save", "trainable_token_indices") if getattr(config, x, None)]
    if not isinstance(config, LoraConfig) or config.bias != "none" or own:
        raise ValueError(
            f"The adapter is a `{type(config).__name__}` with bias={getattr(config, 'bias', None)!r} and "
            f"{own or 'nothing'} of the model trained: it cannot be taken off. Give a LoRA with neither."
        )
    memo: dict[int, Any] = {id(parameter): parameter for parameter in assistant.parameters()}
    for module in assistant.modules():
        if isinstance(module, BaseTunerLayer):  # the copy below reuses it
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
    plain: Any = copy.deepcopy(assistant.get_base_model(), memo)
    return plain.eval()
