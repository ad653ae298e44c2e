"""A collator of the user's own, for the rows of one role."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blur_trainer.data.collators import UnlearningCollator

_NEEDED = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class RowCollator(UnlearningCollator):
    """
    An [`UnlearningCollator`] that pads with `rows`: a collator of `{"input_ids", "labels"}` rows, such as transformers'
    `DataCollatorForSeq2Seq`. It is called for each role, and for refusals. Objectives read the three tensors that it
    must make; others are in the batch too, for a `compute_loss` of one's own.
    """

    rows: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None

    def _padded(self, examples: Sequence[Mapping[str, Any]], prefix: str, role: str) -> dict[str, Tensor]:
        batch = super()._padded(examples, prefix, role)
        if self.rows is None:
            return batch
        own = self.rows(
            [{name: example[f"{prefix}{name}"] for name in ("input_ids", "labels")} for example in examples]
        )
        missing = [name for name in _NEEDED if name not in own]
        shapes = {tuple(own[name].shape) for name in _NEEDED} if not missing else set()
        if missing or len(shapes) != 1 or len(shapes.pop()) != 2 or len(own["input_ids"]) != len(examples):
            raise ValueError(
                f"`data_collator` must make one batch of `input_ids`, `attention_mask` and `labels`, each (B, T), of "
                f"{len(examples)} rows with `input_ids` and `labels`; it made "
                f"{ {name: tuple(getattr(value, 'shape', ())) for name, value in own.items()} }."
            )
        return batch | dict(own)
