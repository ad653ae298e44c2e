"""Objectives on activations instead of answers: RMU, and the match with the frozen model that keeps the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blur_trainer.models.early_exit import activations
from blur_trainer.models.forward import hidden_size
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective, positive
from blur_trainer.objectives.control_vectors import control_vector, load_vectors, save_vectors
from blur_trainer.objectives.losses import activation_loss


@dataclass(frozen=True)
class ActivationObjective(Objective):
    """Base of what looks at the output of one decoder layer: nothing above it is computed.

    An item is a token that is attended to: there are no labels, prompts count too. `masked=False`: every position of
    the batch, padding included, as the WMDP authors' and BLUR's code have it.
    """

    layer: int = 7
    masked: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise ValueError(
                f"{type(self).__name__}: `layer` must be the number of a layer, from 0, got {self.layer!r}."
            )

    @property
    def top_layer(self) -> int:
        return self.layer

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        """What the activations shall be, `(B, T, H)` or `(B, 1, H)`."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        # the target first: a reference's activations are gone before the graph of the model is built
        target = self.target(hidden_size(model), batch, reference)
        mask = batch["attention_mask"] if self.masked else None
        return activation_loss(activations(model, batch, self.layer), target, mask)

    def num_items(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        return mask.sum() if self.masked else torch.ones_like(mask).sum()


@dataclass(frozen=True)
class RMU(ActivationObjective):
    """Representation misdirection (arXiv 2403.03218): activations of one layer towards `coefficient * u`, token mean.

    `u` is a random unit vector per topic, drawn from `seed` and the topic's name ([`control_vector`]), kept in
    checkpoints. Batches carry `topic` `(B,)`, the index in `topics`; without it all are of the first one.

    Args:
        layer: whose output is moved, from 0; 7 of 32 in WMDP's code.
        masked: see [`ActivationObjective`].
        coefficient: how far, one number or one per topic.
        topics: names. A trainer sets them where it is given several forget sets by name.
        seed: of the vectors.
    """

    coefficient: float | Mapping[str, float] = 6.5
    topics: tuple[str, ...] = ("forget",)
    seed: int = 0
    #: vectors and `coefficient * vectors`, by size and place; a checkpoint's vectors are put here
    _kept: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "topics", tuple(self.topics))
        if not self.topics or len(set(self.topics)) != len(self.topics):
            raise ValueError(f"RMU: `topics` must be different names, at least one, got {self.topics}.")
        if isinstance(self.coefficient, Mapping):
            for topic in self.topics:
                if topic not in self.coefficient:
                    raise ValueError(f"RMU: `coefficient` has {sorted(self.coefficient)}, and not {topic!r}.")
        for value in self.coefficients:
            positive("RMU", "coefficient", value)

    @property
    def coefficients(self) -> list[float]:
        """One per topic."""
        given = self.coefficient
        return [given[topic] if isinstance(given, Mapping) else given for topic in self.topics]

    def vectors(self, size: int) -> Tensor:
        """The unit vectors, `(topics, size)` float32, on the CPU."""
        if size not in self._kept:
            self._kept[size] = torch.stack([control_vector(topic, size, self.seed) for topic in self.topics])
        return self._kept[size]

    def save_state(self, folder: str | Path, model: nn.Module) -> None:
        """The vectors. They follow from the seed, but a resumed training may have another one, or another torch."""
        save_vectors(folder, self.topics, self.vectors(hidden_size(model)))

    def load_state(self, folder: str | Path, model: nn.Module) -> None:
        """The vectors of a checkpoint. Raises `ValueError` where they are missing, or of other topics or sizes."""
        self.restore(load_vectors(folder, self.topics, hidden_size(model)))

    def restore(self, vectors: Tensor) -> None:
        """Takes these vectors from now on, `(topics, H)`."""
        self._kept.clear()
        self._kept[vectors.shape[-1]] = vectors

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        device = batch["input_ids"].device
        if (hidden_size, device) not in self._kept:
            scales = torch.tensor(self.coefficients)[:, None]
            self._kept[hidden_size, device] = (scales * self.vectors(hidden_size)).to(device)
        table = self._kept[hidden_size, device]
        topic = batch.get("topic")
        return table[:1, None] if topic is None else table[topic][:, None]


@dataclass(frozen=True)
class ActivationMatch(ActivationObjective):
    """The activations of one layer as the frozen model has them, token mean of squares: RMU's retain objective.

    Of the frozen model only the layers up to this one are kept and run; `blur_trainer.models.reference` has the cost.
    """

    needs_reference: ClassVar[bool] = True
    needs_reference_logits: ClassVar[bool] = True

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        if reference is None:
            raise ValueError("ActivationMatch needs a reference model's activations; pass `reference`.")
        return reference.activations(batch, self.layer)
