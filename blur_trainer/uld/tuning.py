"""The weight and the filter of a logit difference, chosen on held-out data: nothing is trained for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.batching import buckets, check_context, check_positive, pad
from blur_trainer.evaluation.distributed import in_shares
from blur_trainer.models.forward import evaluating
from blur_trainer.models.logit_composition import check_composition, composition_named
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.models.logps import answer_mask

WEIGHTS = (-0.2, -0.4, -0.6, -0.8, -1.0, -1.25, -1.5, -2.0)
FILTERS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Tuning:
    """What [`tune_weight`] chose, and `rows`: every pair with its probabilities and score, in the order of the grid."""

    weight: float
    top_logit_filter: float
    rows: list[dict[str, float]]


def forget_and_retain(forget: float, retain: float) -> float:
    """Harmonic mean of what is gone of the forget answers and what is left of the retain answers, both in [0, 1]."""
    gone, left = max(0.0, 1.0 - forget), min(1.0, retain)
    return 2 * gone * left / (gone + left) if gone + left else 0.0


def tune_weight(
    model: LogitDifferenceModel,
    forget: Any,
    retain: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: Sequence[float] = WEIGHTS,
    top_logit_filters: Sequence[float] = FILTERS,
    score: Callable[[float, float], float] = forget_and_retain,
    batch_size: int = 8,
    max_length: int | None = None,
    qa_template: str = "Question: {question}\nAnswer:",
    progress: bool = True,
) -> Tuning:
    r"""
    Chooses `weight` and `top_logit_filter` on data that the assistant was not trained on, and sets them in
    `model.config`.

    For every pair and both sets the answer probability $p = \frac1n\sum_i \exp\big(\frac{1}{|y_i|}
    \sum_t \log p(y_{it})\big)$ is taken relative to the target's own, and the pair with the highest `score(forget,
    retain)` wins; of equals the one nearest to no change. Target and assistant run once per batch for all pairs.

    Args:
        model ([`LogitDifferenceModel`]): as trained; its present weight and filter do not matter.
        forget, retain: held-out examples, in any format that the trainers take (paraphrased forget questions, say).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): needed unless the examples are tokenized.
        weights, top_logit_filters (`Sequence[float]`): the grid.
        score: of the two relative probabilities; [`forget_and_retain`] by default.
        batch_size, max_length, qa_template, progress: as elsewhere.

    Returns:
        [`Tuning`]
    """
    check_positive(batch_size=batch_size)
    pairs = list(product(weights, top_logit_filters))
    if not pairs:
        raise ValueError("`weights` and `top_logit_filters` must each hold a number.")
    for weight, top_logit_filter in pairs:
        check_composition(weight, top_logit_filter)
    pairs.sort(key=lambda pair: abs(pair[0]))  # of equals the first wins
    tokenized = {
        role: tokenize_dataset(rows, tokenizer, role=role, max_length=max_length, qa_template=qa_template)
        for role, rows in (("forget", forget), ("retain", retain))
    }
    means = {
        role: _probabilities(model, rows, [(0.0, 0.0), *pairs], batch_size, f"{role} answers" if progress else None)
        for role, rows in tokenized.items()
    }
    relative = {role: (values[1:] / values[0]).tolist() for role, values in means.items()}
    rows = [
        {"weight": w, "top_logit_filter": f, "forget": p_f, "retain": p_r, "score": float(score(p_f, p_r))}
        for (w, f), p_f, p_r in zip(pairs, relative["forget"], relative["retain"], strict=True)
    ]
    best = max(rows, key=lambda row: row["score"])
    model.config.weight, model.config.top_logit_filter = best["weight"], best["top_logit_filter"]
    order = {pair: index for index, pair in enumerate(product(weights, top_logit_filters))}
    rows.sort(key=lambda row: order[row["weight"], row["top_logit_filter"]])
    return Tuning(best["weight"], best["top_logit_filter"], rows)


def _probabilities(
    model: LogitDifferenceModel, rows: Dataset, pairs: list[tuple[float, float]], batch_size: int, desc: str | None
) -> np.ndarray:
    """Mean answer probability of the rows under every pair, shape (pairs,)."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    check_context(model.target, lengths, what="example")
    composition = composition_named(model.config.composition)

    def run(indices: list[int]) -> list[np.ndarray]:
        batch = rows[indices]
        input_ids, attention_mask = pad(batch["input_ids"], 0, "right", model.device)
        labels, _ = pad(batch["labels"], IGNORE_INDEX, "right", model.device)
        mask = answer_mask(labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        target, assistant = (part(**inputs).logits[:, :-1][mask] for part in (model.target, model.assistant))
        base = None if model.base is None else model.base(**inputs).logits[:, :-1][mask]
        counts = mask.sum(-1).tolist()
        found = []
        for weight, top_logit_filter in pairs:
            logps = composition(target, assistant, base, weight, top_logit_filter).float().log_softmax(-1)
            picked = logps.gather(-1, labels[:, 1:][mask][:, None]).squeeze(-1)
            found.append(torch.stack([row.mean().exp() for row in picked.split(counts)]))
        return list(torch.stack(found, dim=-1).cpu().numpy().astype(np.float64))

    with evaluating(model):
        return np.mean(in_shares(model, buckets(lengths, batch_size), run, desc), axis=0)
