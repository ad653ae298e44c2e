"""What every objective is: a model and a batch in, a scalar out, so that micro-batches add up to their window."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: `sum of losses / number of items`.

    A subclass gives `losses` and says what an item is: `per="token"` averages over the answer tokens, `per="example"`
    over the examples. The trainer passes `num_items` of the whole accumulation window (and of all processes), so that
    micro-batches of unequal length add up to exactly the mean over the window.
    """

    per: ClassVar[Literal["token", "example"]] = "token"
    needs_reference: ClassVar[bool] = False
    #: more of the reference than log-probabilities (whole distributions, activations): cannot be precomputed
    needs_reference_logits: ClassVar[bool] = False
    #: batches carry `"refusal"`: the same prompts with a refusal as the answer
    needs_refusal: ClassVar[bool] = False

    @property
    def top_layer(self) -> int | None:
        """The last decoder layer that is run, of the model and of the reference. `None`: all of the model is."""
        return None

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        """`(B,)`"""
        raise NotImplementedError

    def save_state(self, folder: str | Path, model: nn.Module) -> None:
        """Writes into a checkpoint what a resumed training needs of this objective. Default: nothing."""

    def load_state(self, folder: str | Path, model: nn.Module) -> None:
        """Reads it back, on every process. Raises `ValueError` where the checkpoint is another objective's."""

    def num_items(self, batch: Batch) -> Tensor:
        """Items in a batch, 0-d int64, on the batch's device."""
        mask = answer_mask(batch["labels"])
        return mask.sum() if self.per == "token" else mask.any(-1).sum()

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        reference: Reference | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """The scalar to descend. `num_items` defaults to the batch's own count."""
        total = self.losses(model, batch, reference).sum()
        return total / (self.num_items(batch) if num_items is None else num_items)


def positive(owner: str, name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{owner}: `{name}` must be a positive number, got {value!r}.")
