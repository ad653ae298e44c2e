"""Reads a prompt once for all that follows it: its keys and values, repeated row by row."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel

from blur_trainer.evaluation.batching import pad


def can_share_prompts(model: PreTrainedModel) -> bool:
    """
    Whether a model's cache of a prompt can be repeated and continued row by row.

    It can if the cache holds only keys and values of full attention: a probe of two tokens must return a
    [`~transformers.Cache`] whose layers are all exactly `DynamicLayer`. Sliding windows (Mistral with one, Gemma2),
    recurrent states, quantized and static caches have other layers and are refused. So are models whose `forward` takes
    no position ids, and PEFT's prompt tuning, which counts virtual tokens.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    if not {"attention_mask", "position_ids", "past_key_values", "use_cache"} <= _arguments(model):
        return False
    probe = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        cache = getattr(model(input_ids=probe, use_cache=True), "past_key_values", None)
    return isinstance(cache, Cache) and len(cache) > 0 and all(type(layer) is DynamicLayer for layer in cache.layers)


def read_prompts(model: PreTrainedModel, prompts: Sequence[list[int]], pad_token_id: int) -> tuple[Cache, Tensor]:
    """Reads the prompts, padded on the left. Returns keys and values, and the attention mask (prompts, T)."""
    input_ids, mask = pad(list(prompts), pad_token_id, "left", model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    if "logits_to_keep" in _arguments(model):
        inputs["logits_to_keep"] = 1  # the logits are not used
    return model(**inputs, use_cache=True).past_key_values, mask


class Prompts:
    """
    Prompts as `generate` takes them, padded on the left, several times each.

    Args:
        shared: whether to read all tokens of a prompt but the last one here, once. `generate` reads the last one for
            each repetition, because it needs its logits. So each prompt needs two tokens.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[list[int]], pad_token_id: int, shared: bool) -> None:
        self.input_ids, self.mask = pad(list(rows), pad_token_id, "left", model.device)
        with torch.no_grad():
            self.cache = read_prompts(model, [row[:-1] for row in rows], pad_token_id)[0] if shared else None

    def repeated(self, count: int) -> dict[str, Any]:
        """Arguments of `generate`: each prompt `count` times in a row."""
        owners = torch.arange(len(self.input_ids), device=self.input_ids.device).repeat_interleave(count)
        inputs: dict[str, Any] = {"input_ids": self.input_ids[owners], "attention_mask": self.mask[owners]}
        if self.cache is not None:
            inputs["past_key_values"] = rows_of(self.cache, owners)
        return inputs


def rows_of(cache: Cache, rows: Tensor) -> Cache:
    """Some rows of a cache as a new one. Nothing else is copied: the deep copy keeps the tensors of the original."""
    layers: Sequence[Any] = cache.layers  # each a `DynamicLayer`: see `can_share_prompts`
    kept = {id(tensor): tensor for layer in layers for tensor in (layer.keys, layer.values)}
    selected = copy.deepcopy(cache, kept)
    selected.batch_select_indices(rows)
    return selected


def _arguments(model: PreTrainedModel) -> set[str]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(base.forward).parameters)
