"""How much of what answers with exchanged words cost a model is due to these words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from blur_trainer.constants import IGNORE_INDEX, OWN_WORDS
from blur_trainer.data.own_words import rows_having, with_own_words
from blur_trainer.evaluation.exchanged import exchanged_rows, retain_rows
from blur_trainer.evaluation.row_losses import encoded_rows, length_limit, loaded_with_tokenizer
from blur_trainer.evaluation.scoring import token_logps

#: rows that are enough for a share
_ROWS = 256


class OwnShare(NamedTuple):
    """Of answers with exchanged words the own tokens' share of the loss, and of the tokens. Both from 0 to 1."""

    loss: float
    tokens: float


def own_shares(
    model: Any,
    forget: Any,
    retain: Any,
    tokenizer: Any = None,
    *,
    least: Sequence[float],
    batch_size: int = 16,
    max_length: int | None = None,
    **how: Any,
) -> dict[float, OwnShare]:
    r"""
    The share $\sum_{own} \ell_t / \sum_{all} \ell_t$ of the loss of answers with exchanged words that falls on tokens
    which RMU's `own_words` would steer, under the model before unlearning; and how many of the tokens these are.

    Near 1 of few tokens: who never saw an answer knows how it goes, and misses its names, numbers and places. The rows
    are those of [`Level.of_exchanged`], 256 of them at most, and so are the arguments. All processes must call it.

    Args:
        least: for which values of `own_words`.

    Returns:
        Of each value the shares. Nothing where no word can be exchanged.
    """
    loaded, tokenizer = loaded_with_tokenizer(model, tokenizer)
    drawn = exchanged_rows(loaded, forget, retain, tokenizer, max_length, **how)
    rows = [row for each in drawn for row in each]
    chosen = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))[:_ROWS]]
    longer = length_limit(loaded, None if max_length is None else 2 * max_length)  # other words may have more tokens
    asked = _flat(encoded_rows(chosen, tokenizer, "forget", longer, drop_empty=True, **how)) if chosen else []
    if not asked:
        return {}
    limit = length_limit(loaded, max_length)
    theirs, ours = (
        [_tokens(_flat(encoded_rows(each, tokenizer, role, limit, drop_empty=True, **how))) for each in sets]
        for role, sets in (("retain", retain_rows(retain, tokenizer)), ("forget", [forget]))
    )
    counted = rows_having(theirs, ours)
    logps = token_logps(loaded, asked, pad_token_id=0, batch_size=batch_size)  # masked, so any id will do
    nats = -np.concatenate(logps).astype(np.float64)
    answers = np.concatenate([np.array(each["labels"][1:]) != IGNORE_INDEX for each in asked])
    shares = {}
    for value in least:
        own = with_own_words(_tokens(asked), *counted, least=value)[OWN_WORDS]
        steered = np.concatenate([each[1:] for each in own])[answers] > 0
        shares[value] = OwnShare(float(nats[steered].sum() / nats.sum()), float(steered.mean()))
    return shares


def _flat(pieces: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [piece for row in pieces for piece in row]


def _tokens(examples: Sequence[dict[str, Any]]) -> Dataset:
    return Dataset.from_dict({name: [list(each[name]) for each in examples] for name in ("input_ids", "labels")})
