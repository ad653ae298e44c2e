"""The forget set's rows with other words: rows of its form that no model ever saw."""

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from blur_trainer.data.chat import has_chat_template
from blur_trainer.data.columns import find_format
from blur_trainer.data.exchange import exchanged_texts, exchanged_tokens, texts_of
from blur_trainer.data.sources import check_dataset, column_names, to_dataset
from blur_trainer.evaluation.forget_sets import asked
from blur_trainer.evaluation.row_losses import encoded_rows, length_limit
from blur_trainer.metrics.rouge_l_recall import rouge_l_recall

#: rows of a retain set that are read: enough to tell a rare word
_READ = 10_000
#: times that each row's words are exchanged
_DRAWS = 4


def exchanged_rows(
    model: Any, forget: Any, retain: Any, tokenizer: Any, max_length: int | None = None, **how: Any
) -> list[list[dict[str, Any]]]:
    """
    For each forget row some with its own words exchanged, none for a row without such a word. As text; as token ids
    where one of the sets has these, and then for each piece of a text.

    Args:
        model: loaded; it limits the length of what is tokenized.
        retain: a dataset, or several by name.
        how: `qa_template` and `day`, as of [`encoded_rows`].
    """
    sets, fmt = retain_rows(retain, tokenizer), _format(forget, "forget")
    formats = [_format(rows, "retain") for rows in sets]
    template = has_chat_template(tokenizer)
    if "input_ids" not in (fmt, *formats):
        texts = (texts_of(row, of) for rows, of in zip(sets, formats, strict=True) for row in rows)
        return exchanged_texts(to_dataset(forget, fmt, "forget", has_template=template), fmt, texts, _DRAWS)
    limit = length_limit(model, max_length)
    ours = encoded_rows(forget, tokenizer, "forget", limit, **how)
    theirs = [rows for one in sets for rows in encoded_rows(one, tokenizer, "retain", limit, **how)]
    return exchanged_tokens(chain(*ours), chain(*theirs), _DRAWS)


def retain_rows(retain: Any, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Of each retain set, one or several by name, the first 10 000 rows."""
    sets = list(retain.values()) if isinstance(retain, Mapping) else [retain]
    template = has_chat_template(tokenizer)
    return [
        list(islice(to_dataset(one, _format(one, "retain"), "retain", has_template=template), _READ)) for one in sets
    ]


def exchanged_rouge(
    model: Any,
    forget: Any,
    exchanged: Sequence[list[dict[str, Any]]],
    tokenizer: Any,
    max_length: int | None = None,
    **how: Any,
) -> float | None:
    """Mean ROUGE-L recall of answers with exchanged words against the true ones, split as a [`ForgetEvaluation`] does.

    `exchanged`: of [`exchanged_rows`]. `None` where words were exchanged as token ids, which may be none.
    """
    fmt = _format(forget, "forget")
    rows = list(to_dataset(forget, fmt, "forget", has_template=has_chat_template(tokenizer)))
    if any("input_ids" in row for drawn in exchanged for row in drawn):
        return None
    limit = length_limit(model, max_length)
    scores: list[float] = []
    for row, drawn in zip(rows, exchanged, strict=True):
        pieces = encoded_rows([row, *drawn], tokenizer, "forget", limit, drop_empty=True, **how)
        if drawn and len(pieces) == 1 + len(drawn):
            answers = [asked(each).answer for each in pieces]
            wanted, *said = tokenizer.batch_decode(answers, skip_special_tokens=True)
            scores.extend(rouge_l_recall(one, wanted) for one in said)
    return float(np.mean(scores)) if scores else None


def _format(dataset: Any, role: str) -> str:
    check_dataset(dataset, role)
    return find_format(column_names(dataset), role)
