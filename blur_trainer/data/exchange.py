"""Answers pieced together from the answers of other rows: what a model says of text that it cannot know."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from blur_trainer.constants import IGNORE_INDEX

#: Tokens of a piece. A model that knows an answer by heart goes on with it after three or four tokens; shorter pieces
#: cost more for their seams than real text does. docs/evidence.md has the numbers for others.
PIECE = 8


def exchanged_answers(examples: Sequence[Mapping[str, Any]], role: str, seed: int = 0) -> list[dict[str, Any]]:
    """
    Each example with another answer of the same length: pieces of [`PIECE`] tokens from answers that differ from its
    own, each drawn by `seed` and taken from the same place where the other answer is long enough, else from its end.

    Args:
        examples: tokenized, with `input_ids` and `labels`. Texts are answers from their first target on.

    Raises:
        `ValueError`: all answers are the same.
    """
    answers = [[token for token in example["labels"] if token != IGNORE_INDEX] for example in examples]
    draw, made = random.Random(seed), []
    for index, example in enumerate(examples):
        donors = [other for other in range(len(answers)) if answers[other] and answers[other] != answers[index]]
        if not donors:
            raise ValueError(
                f"Example {index} of the `{role}` dataset has no other one with another answer ({len(examples)} in "
                "all): nothing can be exchanged. Give more rows, or take the level from unseen text."
            )
        tokens: list[int] = []
        while len(tokens) < len(answers[index]):
            donor = answers[draw.choice(donors)]
            start = min(len(tokens), max(0, len(donor) - PIECE))
            tokens += donor[start : start + PIECE]
        made.append(_with_answer(example, tokens))
    return made


def _with_answer(example: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """The example with these tokens where its targets are."""
    ids, labels, given = list(example["input_ids"]), list(example["labels"]), iter(tokens)
    for place, label in enumerate(labels):
        if label != IGNORE_INDEX:
            ids[place] = labels[place] = next(given)
    return {**example, "input_ids": ids, "labels": labels}
