"""Prepares inputs of evaluation forward passes: checks, buckets by length, pads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, with special tokens, without padding or truncation."""
    if isinstance(prompts, str):
        raise TypeError("`prompts` must be a list of strings, got one string. Put it in a list.")
    if len(prompts) == 0:
        return []
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    for index, ids in enumerate(prompt_ids):
        if len(ids) == 0:
            raise ValueError(
                f"`prompts[{index}]` ({prompts[index]!r}) has no token to continue: the text is empty and the "
                "tokenizer adds no BOS. Pass a prompt of at least one token."
            )
    return prompt_ids


def check_example(index: int, example: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The `(input_ids, labels)` of a tokenized example. `index` is for error messages."""
    missing = [key for key in ("input_ids", "labels") if key not in example]
    if missing:
        raise ValueError(f"`examples[{index}]` lacks {missing}, it has {sorted(example)}. Tokenize the examples first.")
    input_ids, labels = list(example["input_ids"]), list(example["labels"])
    if len(input_ids) != len(labels) or not input_ids:
        raise ValueError(
            f"`examples[{index}]` has {len(input_ids)} input_ids and {len(labels)} labels; both must be equally long "
            "and not empty."
        )
    return input_ids, labels


def check_context(model: PreTrainedModel, lengths: list[int], *, what: str, max_new_tokens: int = 0) -> None:
    """Raises if a sequence is longer than the model's positions. Cutting it silently would change the score."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    for index, length in enumerate(lengths):
        if length + max_new_tokens > limit:
            new = (
                f" and `max_new_tokens` is {max_new_tokens}: {length + max_new_tokens} in all" if max_new_tokens else ""
            )
            raise ValueError(
                f"`{what}s[{index}]` has {length} tokens{new}. The model takes {limit} (`max_position_embeddings`). "
                f"Shorten this {what}{' or lower `max_new_tokens`' if max_new_tokens else ''}."
            )


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_stop_strings(stop_strings: Sequence[str] | None) -> tuple[str, ...]:
    if stop_strings is None:
        return ()
    if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ValueError(f"`stop_strings` must be a list of non-empty strings, got {stop_strings!r}.")
    return tuple(stop_strings)


def buckets(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches of indices by falling length. So there is little padding, and the first batch needs most memory."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: list[list[int]], pad_token_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T). The mask follows the lengths, so a real pad token is attended to."""
    width = max(len(row) for row in rows)
    both = torch.zeros(2, len(rows), width, dtype=torch.long)
    input_ids, attention_mask = both
    input_ids.fill_(pad_token_id)
    for index, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        input_ids[index, span] = torch.tensor(row)
        attention_mask[index, span] = 1
    input_ids, attention_mask = both.to(device)  # one copy
    return input_ids, attention_mask
