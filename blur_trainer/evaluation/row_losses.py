"""What each row of a dataset costs a model, in nats per answer token."""

import math
from datetime import date
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.chat import has_chat_template
from blur_trainer.data.columns import find_format
from blur_trainer.data.encoding import RowEncoder, leading_special_ids
from blur_trainer.data.sources import check_dataset, column_names, to_dataset
from blur_trainer.evaluation.scoring import token_logps
from blur_trainer.models.loading import hub_arguments, load_pretrained

QA = "Question: {question}\nAnswer:"


def row_nats(
    model: PreTrainedModel | str,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    role: str,
    known: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    qa_template: str = QA,
    day: date | None = None,
) -> list[float]:
    """
    Mean nats per answer token of each row, in order; all processes must call it. See [`Level`].

    `known`: some rows may cost nothing, because the model knows them by heart, and rows that are too long are left out.
    """
    loaded, tokenizer = loaded_with_tokenizer(model, tokenizer)
    limit = length_limit(loaded, max_length)
    pieces = encoded_rows(dataset, tokenizer, role, limit, qa_template, day, drop_empty=known)
    flat = [piece for row in pieces for piece in row]
    logps = token_logps(loaded, flat, pad_token_id=0, batch_size=batch_size)  # masked, so any id will do
    sums = iter((float(one.sum(dtype=np.float64)), len(one)) for one in logps)
    nats = []
    for row in pieces:
        total, tokens = map(sum, zip(*(next(sums) for _ in row), strict=True))
        nats.append(-total / tokens)
    least = -math.inf if known else 0
    bad = next((index for index, value in enumerate(nats) if not least < value < math.inf), None)
    if bad is not None:
        raise ValueError(
            f"Row {bad} of the `{role}` dataset costs the model {nats[bad]!r} nats per token, which is no level: the "
            "model knows it by heart, or is broken. Take the row out, or pass another model."
        )
    return nats


def loaded_with_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model by its name, on this process's accelerator if there is one, and the tokenizer beside it."""
    if not isinstance(model, str):
        return model, tokenizer
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model, **hub_arguments({}))
    return load_pretrained(model, {}).to(device), tokenizer


def length_limit(model: Any, max_length: int | None) -> int | None:
    """`max_length`, and no more than the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (max_length, positions) if n is not None), default=None)


def encoded_rows(
    dataset: Any,
    tokenizer: Any,
    role: str,
    max_length: int | None,
    qa_template: str = QA,
    day: date | None = None,
    *,
    drop_empty: bool = False,
) -> list[list[dict[str, Any]]]:
    """The examples of each row, as training has them. Raises `ValueError` for an empty row, or leaves it out."""
    check_dataset(dataset, role)
    fmt = find_format(column_names(dataset), role)
    if tokenizer is None and fmt != "input_ids":
        raise ValueError(f"The `{role}` dataset is text, and the model was given loaded: pass its `tokenizer` too.")
    prefix = leading_special_ids(tokenizer) if tokenizer is not None else []
    rows = list(to_dataset(dataset, fmt, role, has_template=has_chat_template(tokenizer)))
    encoder = RowEncoder(tokenizer, fmt, role, prefix, max_length, False, 0, qa_template, None, day or date.today())
    pieces = [encoder.encode(row, index) for index, row in enumerate(rows)]
    if drop_empty:
        return [examples for examples in pieces if not any(example["empty"] for example in examples)]
    for index, examples in enumerate(pieces):
        if any(example["empty"] for example in examples):
            raise ValueError(
                f"Row {index} of the `{role}` dataset is empty, or has no answer token within {max_length} tokens: "
                "take it out, or raise `max_length`."
            )
    return pieces
