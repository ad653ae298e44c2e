"""The base of all objectives. They turn a model and a batch into a scalar that can be summed over micro-batches."""

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

    A subclass defines `losses` and what an item is: `per="token"` averages over the answer tokens, `per="example"` over
    the examples. The trainer sums `losses` over the accumulation window and all processes, and divides by the summed
    `num_items`. So micro-batches of unequal length give exactly the mean over the window.

    With weights of the examples, `batch["weight"]` `(B,)`, it is the weighted mean of all items: `sum_i w_i losses_i /
    sum_i w_i items_i`.
    """

    per: ClassVar[Literal["token", "example"]] = "token"
    needs_reference: ClassVar[bool] = False
    #: needs the reference's distributions or activations, which cannot be precomputed
    needs_reference_logits: ClassVar[bool] = False
    #: reads whole distributions of the model, so that its logits are kept and a fused head is of no use
    needs_logits: ClassVar[bool] = False
    #: needs `batch["refusal"]`: the same prompts with a refusal as the answer
    needs_refusal: ClassVar[bool] = False
    #: needs other answers than a built-in refusal in `batch["refusal"]`: those of the column `alternative`, an example
    #: for each, else sampled from the model before training
    needs_alternatives: ClassVar[bool] = False
    #: needs `batch["forget_level"]` `(B,)`, nats per token: the forget set's column `forget_level`
    needs_level: ClassVar[bool] = False
    #: needs `batch["shared_start"]` `(B,)`, int64: so many tokens of the example another one begins with, too. To
    #: forget: any retain example; to retain: the one before it in sorted order (`data.shared_start`)
    needs_shared_start: ClassVar[bool] = False
    #: needs `batch["own_words"]` `(B, T)`, int64: 1 and its kind where a token of the answer is to be forgotten, this
    #: share of an answer at least, and vectors that a trainer learns (`data.own_words`, `objectives.learned_vectors`)
    needs_own_words: ClassVar[float | None] = None
    #: obeys `batch["beyond"]` `(B,)`, bool: the loss of such an example is what brings its answer back
    brings_back: ClassVar[bool] = False

    @property
    def top_layer(self) -> int | None:
        """The last decoder layer that is run, in model and reference. `None`: the whole model is run."""
        return None

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        """The loss of each example, `(B,)`: a sum over its items, not a mean."""
        raise NotImplementedError

    def save_state(self, folder: str | Path, model: nn.Module) -> None:
        """Writes into a checkpoint what a resumed training needs of this objective. Default: nothing."""

    def load_state(self, folder: str | Path, model: nn.Module) -> None:
        """Reads it back, on every process. Raises `ValueError` where the checkpoint is another objective's."""

    def items(self, batch: Batch) -> Tensor:
        """Number of items of each example, `(B,)` int64, on the batch's device."""
        mask = answer_mask(batch["labels"])
        return mask.sum(-1) if self.per == "token" else mask.any(-1).long()

    def num_items(self, batch: Batch) -> Tensor:
        """Number of items in a batch, 0-d int64, on the batch's device. With weights: float32, their weighted sum."""
        items, weight = self.items(batch), batch.get("weight")
        return items.sum() if weight is None else (items * weight).sum()

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        reference: Reference | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """The scalar to descend, 0 without items. Default of `num_items`: the batch's own count."""
        losses, weight = self.losses(model, batch, reference), batch.get("weight")
        total = losses.sum() if weight is None else (losses * weight).sum()
        count = self.num_items(batch) if num_items is None else num_items
        return total / (count.where(count != 0, 1) if isinstance(count, Tensor) else count or 1)
