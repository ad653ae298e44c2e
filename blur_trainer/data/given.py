"""Rows that the user has tokenized: padding dropped, targets as labels, cut to the longest length."""

from collections.abc import Mapping
from typing import Any

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.columns import MASKS

_SCORES = ("ref_logps", "refusal_ref_logps")


def given_example(row: Mapping[str, Any], where: str, max_length: int | None) -> dict[str, Any]:
    """
    The example of a checked row with `input_ids`.

    Tokens that `attention_mask` masks are dropped, at the start or at the end. Without `labels`, the targets are what
    `completion_mask` or `assistant_masks` select (TRL's names), else all tokens.
    """
    ids = row["input_ids"]
    labels = row.get("labels")
    if labels is None:
        chosen = [row[column] for column in MASKS if column in row]
        targets = [all(bits) for bits in zip(*chosen, strict=True)] if chosen else [True] * len(ids)
        labels = [token if target else IGNORE_INDEX for token, target in zip(ids, targets, strict=True)]
    kept = _attended(row.get("attention_mask"), where)
    example = {"input_ids": ids[kept], "labels": labels[kept]}
    example |= {column: row[column] for column in ("refusal_input_ids", "refusal_labels") if column in row}
    scores = {column: row[column] for column in _SCORES if column in row}
    cut = {column: tokens[:max_length] for column, tokens in example.items()}
    if scores and cut != example:
        raise ValueError(
            f"{where[0].upper()}{where[1:]} is longer than max_length={max_length}, but its {list(scores)} belong to "
            "the whole sequence: raise `max_length` or remove these columns."
        )
    return cut | scores


def _attended(mask: list[int] | None, where: str) -> slice:
    """The part of a row that is no padding."""
    if mask is None:
        return slice(None)
    if 1 not in mask:
        raise ValueError(f"`attention_mask` in {where} is 0 everywhere: remove the row, or mend its mask.")
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[start:end]:
        raise ValueError(
            f"`attention_mask` in {where} is 0 at position {mask.index(0, start)}, between tokens that count: only "
            "padding at the start or at the end can be left out. Remove these tokens, or the column."
        )
    return slice(start, end)
