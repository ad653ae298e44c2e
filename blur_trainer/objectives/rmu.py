"""RMU: activations of one layer are steered towards a vector, so that what the layers above say is lost."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur_trainer.checks import check_value
from blur_trainer.constants import KINDS
from blur_trainer.models.forward import hidden_size
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.activations import ActivationObjective
from blur_trainer.objectives.base import Batch
from blur_trainer.objectives.control_vectors import control_vector, load_vectors, save_vectors

#: the length of a random vector in WMDP's code
COEFFICIENT = 6.5


@dataclass(frozen=True)
class RMU(ActivationObjective):
    r"""Representation misdirection (arXiv 2403.03218): activations of one layer towards `coefficient * u`, token mean.

    `u` is a random unit vector per topic, drawn from `seed` and the topic's name ([`control_vector`]) and kept in
    checkpoints. Batches have `topic` `(B,)`, the index in `topics`. Without it all examples are of the first topic.

    Args:
        layer: the layer whose output is moved, counted from 0. It is 7 of 32 in WMDP's code.
        masked: see [`ActivationObjective`].
        coefficient: the length of the target vector, one number or one per topic. Default: 6.5, as published; of
            learned vectors the mean length of the activations that are steered.
        topics: names. A trainer sets them if it gets several forget sets by name.
        seed: seed of the vectors.
        skip_shared_start: leave out the start of each example that a retain example has, too, such as a system prompt
            or `Question: What is`. A causal model has the same activations there, so that they cannot be steered here
            and held there. Default: as published, all positions.
        answers_only: steer the tokens of the answers and the one before each, from which the answer is said. The words
            of a question, such as a first name, are words of other texts, too. Default: as published, prompts count.
        own_words: steer only where a token of the answer is said that retain rows hardly have, such as a name, and the
            rarest others up to this share of each answer's tokens. And towards vectors that a trainer learns before
            the first step ([`learned_vectors`]), unless `restore` gave some: with them the model says other such
            tokens there, of the same kind. So the rest of the answer stays. For answers of one form (docs/evidence.md).

    Formula: $\frac1H \|h_t(\theta) - c\,u_k\|^2$, $c$ the `coefficient`
    Bounded: below by 0.
    Use it: to forget a field of knowledge from texts without questions, as in WMDP; with `answers_only`, answers.
    Source: Li et al., arXiv 2403.03218; the last three options are ours.
    """

    brings_back: ClassVar[bool] = True
    coefficient: float | Mapping[str, float] | None = None
    topics: tuple[str, ...] = ("forget",)
    seed: int = 0
    answers_only: bool = False
    own_words: float | None = None
    #: cached vectors by size, `coefficient * vectors` by size and device, and those of `restore` as "restored"
    _kept: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_masked("answers_only")
        self.check_masked("own_words")
        check_value("own_words", self.own_words, (float, type(None)), "(0, 1]", owner="RMU")
        if self.answers_only and self.own_words:
            raise ValueError("RMU: `own_words` are those of answers, so `answers_only` has no effect: leave one out.")
        object.__setattr__(self, "needs_own_words", self.own_words)
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
        """The coefficient of each topic. Learned vectors have their lengths themselves."""
        given = self.coefficient
        if given is None:
            given = 1.0 if self.own_words else COEFFICIENT
        return [given[topic] if isinstance(given, Mapping) else given for topic in self.topics]

    def vectors(self, size: int) -> Tensor:
        """
        The unit vectors, `(topics, size)` float32, on the CPU; of `own_words` those that were learned, `(topics, kinds,
        size)`. Raises if those of `restore` have another size.
        """
        if "restored" in self._kept:
            if (kept := self._kept["restored"]).shape[-1] != size:
                raise ValueError(
                    f"RMU: the vectors given to `restore` have {kept.shape[-1]} entries, the model's hidden size is "
                    f"{size}: give vectors of that size."
                )
            return kept
        if self.own_words:
            raise ValueError(
                "RMU: with `own_words` the vectors are learned, and there is none yet: a trainer learns them, or give "
                "some to `restore`."
            )
        if size not in self._kept:
            self._kept[size] = torch.stack([control_vector(topic, size, self.seed) for topic in self.topics])
        return self._kept[size]

    def for_topics(self, topics: Sequence[str], coefficient: Mapping[str, float] | None) -> "RMU":
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

    @property
    def restored(self) -> Tensor | None:
        """The vectors that `restore` was given."""
        return self._kept.get("restored")

    def restore(self, vectors: Tensor) -> None:
        """Takes these vectors from now on, shaped as of `vectors`. Raises `ValueError` for another shape."""
        shape = (len(self.topics), KINDS) if self.own_words else (len(self.topics),)
        if vectors.shape[:-1] != shape:
            raise ValueError(
                f"RMU: `restore` needs vectors of shape ({', '.join(map(str, shape))}, hidden size) for "
                f"{list(self.topics)}, got {tuple(vectors.shape)}."
            )
        self._kept.clear()
        self._kept["restored"] = vectors

    def mask(self, batch: Batch) -> Tensor:
        counted = super().mask(batch)
        if self.answers_only:
            answers = answer_mask(batch["labels"])
            return counted * (F.pad(answers, (1, 0)) | F.pad(answers, (0, 1)))
        if not self.own_words:
            return counted
        if "own_words" not in batch:
            raise ValueError("RMU: `own_words` needs `batch['own_words']`, `(B, T)`; a trainer makes it from the sets.")
        return counted * (self.said(batch) > 0)

    @staticmethod
    def said(batch: Batch) -> Tensor:
        """Of each place `own_words` of the token that is said from there, the next one, `(B, T)`."""
        return F.pad(batch["own_words"][:, 1:], (0, 1))

    def target(self, hidden_size: int, batch: Batch, reference: Reference | None) -> Tensor:
        device = batch["input_ids"].device
        if (hidden_size, device) not in self._kept:
            vectors = self.vectors(hidden_size)
            scales = torch.tensor(self.coefficients).view(-1, *[1] * (vectors.dim() - 1))
            self._kept[hidden_size, device] = (scales * vectors).to(device)
        table = self._kept[hidden_size, device]
        topic = batch.get("topic", torch.zeros(1, dtype=torch.long, device=device))[:, None]
        steered = table[topic, (self.said(batch) - 1).clamp(min=0)] if self.own_words else table[topic]
        if "beyond" not in batch:
            return steered
        if reference is None:
            raise ValueError("RMU brings answers back to a reference model's activations; pass `reference`.")
        return torch.where(batch["beyond"][:, None, None], reference.activations(batch, self.layer), steered)
