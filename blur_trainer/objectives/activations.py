"""Objectives on activations: RMU for forgetting, and the match with the frozen model for retaining."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur_trainer.checks import check_fields, check_value
from blur_trainer.models.early_exit import activations
from blur_trainer.models.forward import hidden_size
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.control_vectors import control_vector, load_vectors, save_vectors
from blur_trainer.objectives.losses import activation_loss


@dataclass(frozen=True)
class ActivationObjective(Objective):
    """Base of objectives on the output of one decoder layer. Layers above it are not run.

    An item is a token that is attended to. Prompts count, too. With `masked=False` every position
    counts, padding included, as in the WMDP authors' and BLUR's code. With `skip_shared_start` the first
    `batch["shared_start"]` `(B,)` tokens of an example do not count: what that is, each objective says.
    """

    layer: int = 7
    masked: bool = True
    skip_shared_start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_fields(self, {"layer": "[0, inf)"}, owner=name)
        object.__setattr__(self, "needs_shared_start", self.skip_shared_start)
        for option in ("skip_shared_start", "answers_only"):
            if getattr(self, option, False) and not self.masked:
                raise ValueError(
                    f"{name}: `masked=False` counts every position, so `{option}` has no effect: leave one out."
                )

    @property
    def top_layer(self) -> int:
        return self.layer

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        """The target of the activations, `(B, T, H)` or `(B, 1, H)`."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
        # compute the target first, so that the reference's activations are freed before the model's graph is built
        target = self.target(hidden_size(model), batch, reference)
        mask = self.mask(batch) if self.masked else None
        return activation_loss(activations(model, batch, self.layer), target, mask)

    def mask(self, batch: Batch) -> Tensor:
        """The positions that count, `(B, T)`."""
        attended = batch["attention_mask"]
        if not self.skip_shared_start:
            return attended
        if "shared_start" not in batch:
            raise ValueError(
                f"{type(self).__name__}: `skip_shared_start` needs `batch['shared_start']`, `(B,)`; a trainer makes it "
                "from the sets."
            )
        return attended * (attended.cumsum(-1) > batch["shared_start"][:, None])

    def items(self, batch: Batch) -> Tensor:
        return (self.mask(batch) if self.masked else torch.ones_like(batch["attention_mask"])).sum(-1)


@dataclass(frozen=True)
class RMU(ActivationObjective):
    r"""Representation misdirection (arXiv 2403.03218): activations of one layer towards `coefficient * u`, token mean.

    `u` is a random unit vector per topic, drawn from `seed` and the topic's name ([`control_vector`]) and kept in
    checkpoints. Batches have `topic` `(B,)`, the index in `topics`. Without it all examples are of the first topic.

    Args:
        layer: the layer whose output is moved, counted from 0. It is 7 of 32 in WMDP's code.
        masked: see [`ActivationObjective`].
        coefficient: the length of the target vector, one number or one per topic.
        topics: names. A trainer sets them if it gets several forget sets by name.
        seed: seed of the vectors.
        skip_shared_start: leave out the start of each example that a retain example has, too, such as a system prompt
            or `Question: What is`. A causal model has the same activations there, so that they cannot be steered here
            and held there. Default: as published, all positions.
        answers_only: steer the tokens of the answers and the one before each, from which the answer is said. The words
            of a question, such as a first name, are words of other texts, too. Default: as published, prompts count.

    Formula: $\frac1H \|h_t(\theta) - c\,u_k\|^2$, $c$ the `coefficient`
    Bounded: below by 0.
    Use it: to forget a field of knowledge from texts without questions, as in WMDP.
    Source: Li et al., arXiv 2403.03218.
    """

    brings_back: ClassVar[bool] = True
    coefficient: float | Mapping[str, float] = 6.5
    topics: tuple[str, ...] = ("forget",)
    seed: int = 0
    answers_only: bool = False
    #: cached vectors by size, `coefficient * vectors` by size and device, and those of `restore` as "restored"
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
            check_value("coefficient", value, (float,), "(0, inf)", owner="RMU")

    @property
    def coefficients(self) -> list[float]:
        """The coefficient of each topic."""
        given = self.coefficient
        return [given[topic] if isinstance(given, Mapping) else given for topic in self.topics]

    def vectors(self, size: int) -> Tensor:
        """The unit vectors, `(topics, size)` float32, on the CPU. Raises if those of `restore` have another size."""
        if "restored" in self._kept:
            if (kept := self._kept["restored"]).shape[-1] != size:
                raise ValueError(
                    f"RMU: the vectors given to `restore` have {kept.shape[-1]} entries, the model's hidden size is "
                    f"{size}: give vectors of that size."
                )
            return kept
        if size not in self._kept:
            self._kept[size] = torch.stack([control_vector(topic, size, self.seed) for topic in self.topics])
        return self._kept[size]

    def for_topics(self, topics: Sequence[str], coefficient: Mapping[str, float]) -> "RMU":
        """The same objective for these topics. Vectors given to `restore` go along, by the topics' names."""
        other = dataclasses.replace(self, topics=tuple(topics), coefficient=coefficient)
        if "restored" in self._kept:
            if missing := [topic for topic in topics if topic not in self.topics]:
                raise ValueError(
                    f"RMU: `restore` has set vectors of the topics {list(self.topics)}, and the forget sets are "
                    f"{list(topics)}: none is known for {missing}. Name the topics alike, `RMU(topics=...)`."
                )
            other.restore(self._kept["restored"][[self.topics.index(topic) for topic in topics]])
        return other

    def save_state(self, folder: str | Path, model: nn.Module) -> None:
        """The vectors. They follow from the seed, but a resumed training may have another one, or another torch."""
        save_vectors(folder, self.topics, self.vectors(hidden_size(model)))

    def load_state(self, folder: str | Path, model: nn.Module) -> None:
        """The vectors of a checkpoint. Raises `ValueError` where they are missing, or of other topics or sizes."""
        self.restore(load_vectors(folder, self.topics, hidden_size(model)))

    def restore(self, vectors: Tensor) -> None:
        """Takes these vectors from now on, `(topics, H)`. Raises `ValueError` for another shape."""
        if vectors.dim() != 2 or len(vectors) != len(self.topics):
            raise ValueError(
                f"RMU: `restore` needs one vector per topic, of shape ({len(self.topics)}, hidden size) for "
                f"{list(self.topics)}, got {tuple(vectors.shape)}."
            )
        self._kept.clear()
        self._kept["restored"] = vectors

    def mask(self, batch: Batch) -> Tensor:
        counted = super().mask(batch)
        if not self.answers_only:
            return counted
        answers = answer_mask(batch["labels"])
        return counted * (F.pad(answers, (1, 0)) | F.pad(answers, (0, 1)))

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        device = batch["input_ids"].device
        if (hidden_size, device) not in self._kept:
            scales = torch.tensor(self.coefficients)[:, None]
            self._kept[hidden_size, device] = (scales * self.vectors(hidden_size)).to(device)
        table = self._kept[hidden_size, device]
        topic = batch.get("topic")
        steered = table[:1, None] if topic is None else table[topic][:, None]
        if "beyond" not in batch:
            return steered
        if reference is None:
            raise ValueError("RMU brings answers back to a reference model's activations; pass `reference`.")
        return torch.where(batch["beyond"][:, None, None], reference.activations(batch, self.layer), steered)


@dataclass(frozen=True)
class ActivationMatch(ActivationObjective):
    r"""Squared distance to the frozen model's activations in one layer, token mean: RMU's retain objective.

    Only the frozen model's layers up to this one are kept and run. `blur_trainer.models.reference` has the cost.

    Args:
        layer, masked: see [`ActivationObjective`].
        skip_shared_start: count a start that several examples have, such as a system prompt, in one of them only. A
            causal model has the same activations there, so counting it in each would leave the rest of the texts a
            smaller share of the mean. Default: as published, all positions.

    Formula: $\frac1H \|h_t(\theta) - h_t(\mathrm{ref})\|^2$
    Bounded: below by 0.
    Use it: with `rmu`.
    Source: Li et al., arXiv 2403.03218.
    """

    needs_reference: ClassVar[bool] = True
    needs_reference_logits: ClassVar[bool] = True

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        if reference is None:
            raise ValueError("ActivationMatch needs a reference model's activations; pass `reference`.")
        return reference.activations(batch, self.layer)
