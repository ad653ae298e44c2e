"""Chooses the weight and the filter of a logit-difference model by a level, on held-out data. Nothing is trained."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blur_trainer.checks import check_value
from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.batching import buckets, check_context, check_positive, pad
from blur_trainer.evaluation.distributed import in_shares
from blur_trainer.models.forward import evaluating
from blur_trainer.models.logit_composition import check_composition, composition_named
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.models.logps import answer_mask

logger = logging.getLogger(__name__)

WEIGHTS = (-0.2, -0.4, -0.6, -0.8, -0.9, -1.0, -1.1, -1.2, -1.3, -1.4, -1.5, -1.75, -2.0)
FILTERS = (0.0, 1e-3, 1e-2, 1e-1)
_COLUMNS = ("weight", "top_logit_filter", "forget", "retain", "change")
_NOT_REACHED = (
    "No pair brings the held-out forget rows to the level of %.4g nats per token. The nearest, weight %g and filter "
    "%g, brings them to %.4g. Try weights further from 0, train the assistant longer or with more paraphrases, or "
    "check that the level and these rows are of the same kind."
)


class HasNats(Protocol):
    """A level that was measured, such as `Level`."""

    @property
    def nats(self) -> float: ...


@dataclass(frozen=True)
class Tuning:
    """
    What [`tune_weight`] chose, and what it tried. Printed, it is a table.

    Args:
        weight, top_logit_filter: the chosen pair.
        level: the level that it was chosen by, in nats per token.
        reached: whether the chosen pair reaches it. If not, no pair does.
        rows: for every pair, in the order of the grid, `weight`, `top_logit_filter`, `forget`, `retain` (the losses, in
            nats per token) and `change` (of the retain rows, likewise).
    """

    weight: float
    top_logit_filter: float
    level: float
    reached: bool
    rows: list[dict[str, float]]

    def __str__(self) -> str:
        chosen = (self.weight, self.top_logit_filter)
        table = [
            [f"{row[name]:.4g}" for name in _COLUMNS]
            + ["yes" if row["forget"] >= self.level else "", "*" if _pair(row) == chosen else ""]
            for row in self.rows
        ]
        heads = ["weight", "filter", "forget loss", "retain loss", "retain change", f"level {self.level:.4g}", "chosen"]
        return tabulate(table, headers=heads, tablefmt="github", disable_numparse=True)


def tune_weight(
    model: LogitDifferenceModel,
    forget: Any,
    retain: Any,
    level: float | HasNats,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: Sequence[float] = WEIGHTS,
    top_logit_filters: Sequence[float] = FILTERS,
    batch_size: int = 8,
    max_length: int | None = None,
    qa_template: str = "Question: {question}\nAnswer:",
    progress: bool = True,
) -> Tuning:
    r"""
    Chooses `weight` and `top_logit_filter` by a level and sets them in `model.config`.

    A pair reaches the level if the mean loss of the forget rows is at least as high, where the loss of a row is
    $-\frac{1}{|y|}\sum_t \log q(y_t)$, in nats per token. Of the pairs that do, the one is chosen that changes the
    retain rows least: the smallest mean of $\frac{1}{|y|}\sum_t \mathrm{KL}(p_t \| q_t)$, $p$ the target, $q$ the
    composed model; among equals the weight nearest to 0. If no pair reaches the level, the one with the highest forget
    loss is chosen, with a warning. Target and assistant run once per batch for all pairs.

    Args:
        model ([`LogitDifferenceModel`]): the trained model. Its present weight and filter do not matter.
        forget: rows that ask for what is to be forgotten, in any format of the trainers: better in words that the
            assistant was not trained on, but in words that the target knows.
        retain: rows that shall stay as they are. Text of other kinds belongs here too: what the model says itself,
            or general text.
        level (`float` or an object with `.nats`): the loss, in nats per token, of a model that never saw what is to be
            forgotten: a retrained model's loss on `forget`, or the target's loss on rows of the same kind that it
            never saw.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): needed unless the examples are tokenized.
        weights, top_logit_filters (`Sequence[float]`): the grid.
        batch_size, max_length, qa_template, progress: as elsewhere.

    Returns:
        [`Tuning`]

    Raises:
        `ValueError`: an empty grid or a value outside its range, or rows that the model cannot read.
        `TypeError`: a level that is no number.
    """
    check_positive(batch_size=batch_size)
    wanted = _nats(level)
    pairs = list(product(weights, top_logit_filters))
    if not pairs:
        raise ValueError("`weights` and `top_logit_filters` must each hold a number.")
    for pair in pairs:
        check_composition(*pair)
    tokenized = {
        role: tokenize_dataset(rows, tokenizer, role=role, max_length=max_length, qa_template=qa_template)
        for role, rows in (("forget", forget), ("retain", retain))
    }
    (losses, _), (kept, changes) = (
        _losses_and_changes(model, rows, pairs, batch_size, f"{role} rows" if progress else None)
        for role, rows in tokenized.items()
    )
    values = zip(losses.tolist(), kept.tolist(), changes.tolist(), strict=True)
    rows = [dict(zip(_COLUMNS, (*pair, *numbers), strict=True)) for pair, numbers in zip(pairs, values, strict=True)]
    best = _chosen(rows, wanted)
    model.config.weight, model.config.top_logit_filter = _pair(best)
    return Tuning(*_pair(best), wanted, best["forget"] >= wanted, rows)


def _nats(level: float | HasNats) -> float:
    nats: Any = getattr(level, "nats", level)
    check_value("level", nats, (float,), "(0, inf)", owner="tune_weight")
    return float(nats)


def _pair(row: dict[str, float]) -> tuple[float, float]:
    return row["weight"], row["top_logit_filter"]


def _chosen(rows: list[dict[str, float]], level: float) -> dict[str, float]:
    """The least change that reaches the level; else the row nearest to it."""
    rows = sorted(rows, key=lambda row: abs(row["weight"]))  # among equals the first wins
    reaching = [row for row in rows if row["forget"] >= level]
    if reaching:
        return min(reaching, key=lambda row: row["change"])
    best = max(rows, key=lambda row: row["forget"])
    logger.warning(_NOT_REACHED, level, *_pair(best), best["forget"])
    return best


def _losses_and_changes(
    model: LogitDifferenceModel, rows: Dataset, pairs: list[tuple[float, float]], batch_size: int, desc: str | None
) -> np.ndarray:
    """Mean loss of the rows and mean KL from the target, under every pair: shape (2, pairs)."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    check_context(model.target, lengths, what="example")
    composition = composition_named(model.config.composition)

    def run(indices: list[int]) -> list[np.ndarray]:
        batch = rows[indices]
        input_ids, attention_mask = pad(batch["input_ids"], 0, "right", model.device)
        labels, _ = pad(batch["labels"], IGNORE_INDEX, "right", model.device)
        mask = answer_mask(labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        parts = (model.target, model.assistant) if model.base is None else (model.target, model.assistant, model.base)
        target, assistant, *base = (part(**inputs).logits[:, :-1][mask] for part in parts)
        answers, counts = labels[:, 1:][mask][:, None], mask.sum(-1).tolist()
        before = target.float().log_softmax(-1)
        found = []
        for pair in pairs:
            after = composition(target, assistant, base[0] if base else None, *pair).float().log_softmax(-1)
            loss = -after.gather(-1, answers).squeeze(-1)
            change = (before.exp() * (before - after)).sum(-1)
            found.append(torch.stack([_row_means(loss, counts), _row_means(change, counts)], dim=-1))
        return list(torch.stack(found, dim=-1).cpu().numpy().astype(np.float64))

    with evaluating(model):
        return np.mean(in_shares(model, buckets(lengths, batch_size), run, desc), axis=0)


def _row_means(values: Tensor, counts: list[int]) -> Tensor:
    """Means over each row's tokens, `(B,)`, of values of all rows' tokens, one row after the other."""
    return torch.stack([row.mean() for row in values.split(counts)])
