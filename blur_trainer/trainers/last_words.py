"""What a training without a level has done, in one line of the log."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import datasets
import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.evaluation.distributed import in_shares
from blur_trainer.models.forward import answer_logps, evaluating
from blur_trainer.report.verdict import judge
from blur_trainer.trainers.level_guard import sample_rows

logger = get_logger(__name__)
#: rows of each set that are measured before and after training
ROWS = 32
#: shorter trainings are tries, of which nothing need be said
LEAST_STEPS = 20


class LastWordsCallback(TrainerCallback):
    """
    Compares the losses of 32 rows of each set before and after training, in nats per answer token, and logs what
    [`judge`] says of them: a warning, unless the loss of the forget set rose and that of the retain set did not.

    Each row is a forward pass of its own, so this never needs more memory than a step. Nothing random is drawn. Not for
    trainings that are resumed, of fewer than 20 steps, or on streams.

    Args:
        sets: the tokenized examples, `forget` and, if there is one, `retain`.
        model: returns the model to measure.
        interrupted: whether a signal ends the training: then there is no time for last words.
        options: the settings that the training reads, of which the advice names some.
    """

    def __init__(
        self,
        sets: Mapping[str, Any],
        model: Callable[[], Any],
        interrupted: Callable[[], bool],
        options: Collection[str] | None = None,
    ) -> None:
        self.sets, self.model, self.interrupted, self.options = sets, model, interrupted, options
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._before: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = {}
        if state.global_step == 0 and state.max_steps >= LEAST_STEPS:
            self._rows = {role: sample_rows(rows, ROWS) for role, rows in self.sets.items()}
            self._before = self._measure()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._before or self.interrupted():
            return
        verdict = judge(self._before, self._measure(), options=self.options)
        where = f"Of {' and '.join(f'{len(rows)} {role} rows' for role, rows in self._rows.items())}"
        if verdict.word == "forgotten":
            loss = self._before["forget_loss"]
            logger.info(f"{where}: {verdict.sentence.partition(': ')[2]} Before training it cost {loss:.3g}.")
            return
        logger.warning(f"{where}, by their losses: {verdict}")

    def _measure(self) -> dict[str, float]:
        return {f"{role}_loss": mean_nats(self.model(), rows) for role, rows in self._rows.items()}


def has_stream(tokenized: Any) -> bool:
    """Whether any of the sets is a stream, whose rows would be read twice."""
    if isinstance(tokenized, Mapping | tuple):
        parts = tokenized.values() if isinstance(tokenized, Mapping) else tokenized
        return any(map(has_stream, parts))
    return isinstance(tokenized, datasets.IterableDataset)


def mean_nats(model: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the rows of nats per answer token. All processes must call it; each does its share."""

    def run(indices: list[int]) -> list[float]:
        (index,) = indices
        ids, labels = (torch.tensor([list(rows[index][key])], device=model.device) for key in ("input_ids", "labels"))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        count = int((labels[:, 1:] != IGNORE_INDEX).sum())
        return [-float(answer_logps(model, batch)) / count]

    with evaluating(model):
        nats = in_shares(model, [[index] for index in range(len(rows))], run, None)
    return sum(nats) / len(nats)
