"""Learns RMU's vectors for `own_words` at construction, or reads those of `output_dir`."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.data.own_words import begin_words, kinds_of, rows_having, said_instead
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.objectives.learned_vectors import STEPS, Words, learned_vectors
from blur_trainer.objectives.level import without_level
from blur_trainer.objectives.rmu import RMU
from blur_trainer.saving import output_dir as saving
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.references import rows_digest
from blur_trainer.trainers.row_columns import named
from blur_trainer.trainers.sampled_file import check_can_answer, kept_or_sampled

logger = logging.getLogger(__name__)

#: file in `output_dir` with the vectors; a resumed training reads them there
VECTORS_NAME = "learned_vectors.json"
_ROWS = 8  # at a time


def settle_vectors(
    objective: Objective,
    forget: Any,
    retain: Any,
    speaker: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearningConfig,
) -> None:
    """Gives the forget objective its vectors, if it is an RMU that learns them. All processes get the same.

    `forget`, `retain`: tokenized, the former with its columns. `speaker`: answers the model before unlearning.
    """
    rmu = without_level(objective)
    if not isinstance(rmu, RMU) or not rmu.own_words:
        return
    if rmu.restored is not None:
        logger.warning("%s has vectors, of `restore` or of another trainer: none is learned.", rmu)
        return
    kept = [rows for _, rows in named("retain", retain)]
    sets = [rows for _, rows in named("forget", forget)]
    model = speaker()
    pad_token_id = setup.pad_token_id(model, tokenizer)
    check_can_answer(model, "make such a trainer, and give the `restored` of its RMU to `RMU.restore`")
    record: dict[str, Any] = {"forget": [*map(rows_digest, sets)], "retain": [*map(rows_digest, kept)]}
    record["settings"] = f"{rmu}, seed {args.seed}"

    def learned() -> list[list[list[float]]]:
        begins, common = begin_words(tokenizer, setup.vocabulary_size(model)), rows_having(kept, sets)[1]
        found = []
        for rows, coefficient in zip(sets, rmu.coefficients, strict=True):
            instead = said_instead(kept, common, begins, kinds_of(rows, common))
            words = Words(*(torch.from_numpy(table).to(args.device) for table in (begins, instead)))
            batches = list(_batches(rows, pad_token_id, args))
            length = None if rmu.coefficient is None else coefficient
            found.append(
                (learned_vectors(model, batches, rmu, words, length, not args.disable_tqdm) / coefficient).tolist()
            )
        return found

    def agreed(alone: bool) -> Any:
        return learned() if alone else saving.agreed(learned, args.process_index == 0)

    rmu.restore(torch.tensor(kept_or_sampled(VECTORS_NAME, record, model, args, agreed)))


def carry_vectors(before: Objective, now: Objective) -> None:
    """Gives an objective that is made anew the vectors of the one before, for another training by one trainer."""
    learned, rmu = without_level(before), without_level(now)
    if not isinstance(rmu, RMU) or not rmu.own_words or rmu is learned:
        return
    if rmu != learned or learned.restored is None:
        raise ValueError(f"The vectors were learned for {learned}, and {rmu} needs others: make a new trainer.")
    rmu.restore(learned.restored)


def _batches(rows: Dataset, pad_token_id: int, args: UnlearningConfig) -> Iterator[Batch]:
    """As many as the learning takes, drawn by the training's seed: the same on any number of processes."""
    collate, size = UnlearningCollator(pad_token_id), min(_ROWS, args.per_device_eval_batch_size, len(rows))
    order = np.random.default_rng(args.seed).permutation(len(rows)).tolist()
    for start in range(0, min(len(rows), STEPS * size), size):
        batch = collate([rows[index] for index in order[start : start + size]])
        yield {name: value.to(args.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
