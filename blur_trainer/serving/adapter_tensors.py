"""Reads a plain LoRA: which matrices it adds to which layer. Needs no vLLM."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_NOT_PLAIN = ("use_dora", "use_qalora", "alora_invocation_tokens", "modules_to_save", "trainable_token_indices")
Pair = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), and the factor s of their product


def plain_lora(tensors: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Pair]:
    """
    A, B and s by the name of the layer in transformers: the layer's output grows by `s B A x`.

    Args:
        tensors: as in `adapter_model.safetensors`.
        lora: as in `adapter_config.json`.

    Raises:
        `ValueError`: the adapter is not complete, or is more than pairs of A and B.
    """
    special = [name for name in _NOT_PLAIN if getattr(lora, name, None)]
    if special:
        raise ValueError(f"The adapter sets {special[0]}, which is no plain LoRA: serve this model by transformers.")
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise ValueError(f"The adapter holds {key!r}, which is no plain LoRA: serve this model by transformers.")
        found[match[1]][match[2]] = tensor
    halves = [name for name, pair in found.items() if len(pair) != 2]
    if halves or not found:
        raise ValueError(f"The adapter is not complete: {f'half of {halves[0]}' if halves else 'no tensors'}.")
    return {name: (pair["A"], pair["B"], _scale(lora, name, len(pair["A"]))) for name, pair in found.items()}


def _scale(lora: LoraConfig, name: str, rank: int) -> float:
    """As PEFT's: alpha over the rank, or over its root. A pattern names the end of a layer's name."""
    alphas = (alpha for key, alpha in (lora.alpha_pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return float(next(alphas, lora.lora_alpha) / (math.sqrt(rank) if lora.use_rslora else rank))


def place_among(fused: Mapping[str, list[str]], name: str) -> tuple[str, int | None]:
    """
    Where vLLM keeps a layer of transformers: the name there, and the place in it where several are fused into one.

    Args:
        fused: a vLLM class's `packed_modules_mapping`, such as `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.
        name: of the layer in transformers.
    """
    parent, dot, last = name.rpartition(".")
    for whole, parts in fused.items():
        if last in parts and len(parts) > 1:
            return parent + dot + whole, parts.index(last)
    return name, None
