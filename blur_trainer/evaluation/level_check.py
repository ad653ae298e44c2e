"""How far a training has come to its level, and what retaining has paid: the benchmark `level` of every trainer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.evaluation.scoring import token_logps


class LevelCheck(Evaluation):
    """
    Mean losses of a sample of the forget and of the retain set, in nats per answer token, mean over examples.

    `score` is what is missing to the level, plus what the retain loss has risen since `retain_before`; a rise beyond
    `bound` adds the level, so that such a model is worse than the one before training. Less is better.

    Args:
        forget, retain: tokenized examples; `retain` may be empty.
        level: nats per token.
        bound: how far the retain loss may rise. `None`: without end.
        batch_size: examples per forward pass.
    """

    def __init__(
        self,
        forget: Sequence[Mapping[str, Any]],
        retain: Sequence[Mapping[str, Any]],
        level: float,
        bound: float | None = None,
        batch_size: int = 16,
    ) -> None:
        self.sets = {"forget": list(forget), "retain": list(retain)}
        self.level, self.bound, self.batch_size = level, bound, batch_size
        #: the retain loss before training, once it is known
        self.retain_before: float | None = None

    @property
    def columns(self) -> list[Column]:
        retain: list[Column] = [{"name": "retain_loss", "label": "Loss retain", "goal": "min", "role": "retain"}]
        return [
            {"name": "score", "label": "Missing and paid", "goal": "min"},
            {"name": "forget_loss", "label": "Loss forget", "goal": "max", "role": "forget"},
            *(retain if self.sets["retain"] else []),
        ]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        found = {
            f"{role}_loss": self._loss(model, rows) for role, rows in self.sets.items() if rows or role == "forget"
        }
        paid = self.paid(found)
        beyond = self.bound is not None and paid > self.bound
        score = max(0.0, self.level - found["forget_loss"]) + max(0.0, paid) + self.level * beyond
        return {"score": score, **found}

    def paid(self, found: Mapping[str, float]) -> float:
        """How far the retain loss has risen, in nats per token; 0 where that is not known."""
        return 0.0 if self.retain_before is None else found["retain_loss"] - self.retain_before

    def _loss(self, model: PreTrainedModel, rows: list[Any]) -> float:
        logps = token_logps(model, rows, pad_token_id=0, batch_size=self.batch_size)  # masked, so any id will do
        return float(np.mean([-one.mean(dtype=np.float64) for one in logps]))
