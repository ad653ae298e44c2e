"""Lists of examples -> padded batches: `{"forget": {...}, "retain": {...}}`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from blur_trainer.constants import OWN_WORDS, ROLES, SHARED_START
from blur_trainer.data.columns import LEVEL


@dataclass(frozen=True)
class UnlearningCollator:
    """
    Collate paired examples into one batch per role, right padded.

    Args:
        pad_token_id (`int`):
            Fills `input_ids`. It may be the EOS id: the attention mask comes from the lengths, so a real EOS is
            still attended to.
        pad_to_multiple_of (`int`, *optional*):
            Pad each length up to a multiple of this.

    Called with a list of

    - items `{"forget": example[, "retain": example]}` ([`PairedDataset`]): returns `{"forget": B[, "retain": B]}`;
    - tokenized examples `{"input_ids", "labels", ...}` (evaluation datasets): returns one B.

    B holds `input_ids`, `attention_mask` and `labels`, int64 of shape (B, T). If the examples have the columns, B also
    holds `ref_logps`, float32 (B,); `refusal`, another B from `refusal_input_ids`, `refusal_labels` and
    `refusal_ref_logps`; `forget_level` and `weight`, float32 (B,); `topic` and `shared_start`, int64 (B,); and
    `own_words`, int64 (B, T). Other columns are left out.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ValueError(
                f"`pad_token_id` is {self.pad_token_id!r}: it must be a token id; where the tokenizer has no padding "
                "token, `tokenizer.pad_token = tokenizer.eos_token` is safe here."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` is {self.pad_to_multiple_of}: it must be at least 1, or None.")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not items:
            raise ValueError("There is nothing to collate: the list of examples is empty.")
        if "forget" not in items[0]:
            return self._batch(items, "examples")
        roles = [role for role in ROLES if any(role in item for item in items)]
        return {role: self._batch([_get(item, role, "items") for item in items], role) for role in roles}

    def _batch(self, examples: Sequence[Mapping[str, Any]], role: str) -> dict[str, Any]:
        batch: dict[str, Any] = self._padded(examples, "", role)
        if any("refusal_input_ids" in example for example in examples):
            batch["refusal"] = self._padded(examples, "refusal_", role)
        if any(LEVEL in example for example in examples):
            levels = [float(_get(example, LEVEL, role)) for example in examples]
            batch[LEVEL] = torch.tensor(levels, dtype=torch.float32)
        for column in ("topic", SHARED_START):
            if any(column in example for example in examples):
                batch[column] = torch.tensor([int(_get(example, column, role)) for example in examples])
        if any(OWN_WORDS in example for example in examples):
            own = torch.cat([_tokens(_get(example, OWN_WORDS, role)) for example in examples])
            attended = batch["attention_mask"].bool()  # on any side of the padding
            if len(own) != attended.sum():
                raise ValueError(
                    f"`{OWN_WORDS}` has {len(own)} values for the {attended.sum()} tokens of a batch ({role}): a "
                    "`data_collator` of one's own must keep all tokens of a row."
                )
            batch[OWN_WORDS] = torch.zeros_like(batch["input_ids"]).masked_scatter(attended, own)
        if any("weight" in example for example in examples):
            weights = [float(_get(example, "weight", role)) for example in examples]
            batch["weight"] = torch.tensor(weights, dtype=torch.float32)
        return batch

    def _padded(self, examples: Sequence[Mapping[str, Any]], prefix: str, role: str) -> dict[str, Tensor]:
        """One B from the columns `{prefix}input_ids`, `{prefix}labels` and perhaps `{prefix}ref_logps`."""
        ids = [_tokens(_get(example, f"{prefix}input_ids", role)) for example in examples]
        labels = [_tokens(_get(example, f"{prefix}labels", role)) for example in examples]
        for row, (one, other) in enumerate(zip(ids, labels, strict=True)):
            if one.shape != other.shape:
                raise ValueError(
                    f"Example {row} of the batch ({role}) has {len(one)} `{prefix}input_ids` but {len(other)} "
                    f"`{prefix}labels`: one label per token is needed."
                )
        multiple = self.pad_to_multiple_of
        batch = {
            "input_ids": pad(ids, self.pad_token_id, pad_to_multiple_of=multiple),
            "attention_mask": pad([torch.ones_like(one) for one in ids], 0, pad_to_multiple_of=multiple),
            "labels": pad(labels, -100, pad_to_multiple_of=multiple),
        }
        if any(f"{prefix}ref_logps" in example for example in examples):
            scores = [float(_get(example, f"{prefix}ref_logps", role)) for example in examples]
            batch["ref_logps"] = torch.tensor(scores, dtype=torch.float32)
        return batch


def _tokens(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _get(example: Mapping[str, Any], column: str, role: str) -> Any:
    """`example[column]`. Raises, with the columns that are there, if only part of a batch has the column."""
    if column not in example:
        raise ValueError(f"`{column}` is missing from one of the batch's {role}: it has {sorted(example)}.")
    return example[column]
