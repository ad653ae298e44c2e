"""What replayed texts begin with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.shared_start import common_start
from blur_trainer.trainers.replay_config import RETAIN_PROMPTS

#: tokens, and whether they are no targets
Prompt = tuple[list[int], bool]

_BEGINNING = 8  # tokens of a retain text that a replayed one begins with


def prompts(
    tokenizer: PreTrainedTokenizerBase, start: list[int], retain: Sequence[Any], num: int, given: Any, seed: int
) -> list[Prompt]:
    """
    `num` prompts.

    Args:
        start: the special tokens in front of each text.
        retain: tokenized examples.
        given: `prompts` of [`~blur_trainer.trainers.replay.replay`].

    Raises:
        `ValueError`: there is no start, or nothing to begin with.
    """
    if given == RETAIN_PROMPTS:
        made = _beginnings(retain, len(start), "`prompts='retain'`")
        made = [made[index] for index in np.random.default_rng(seed).permutation(len(made))]
    elif given is not None:
        bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given]
        made = [(ids if ids[: len(start)] == start else start + ids, False) for ids in bare]
    else:
        if not start and tokenizer.bos_token_id is None:
            raise ValueError(
                "replay: the tokenizer puts nothing in front of a text and has no BOS, so it is not known what the "
                "model starts with: pass `prompts`, beginnings of its training texts such as ['Question:']."
            )
        made = [(start or [tokenizer.bos_token_id], False)]
    return [made[index % len(made)] for index in range(num)]


def scrambled_prompts(
    tokenizer: PreTrainedTokenizerBase,
    start: list[int],
    retain: Sequence[Any],
    num: int,
    *,
    share: float,
    vocabulary: int,
    seed: int,
) -> list[Prompt]:
    """
    Beginnings of retain rows, drawn with repetition, where a share of the tokens is exchanged for random ones of the
    `vocabulary` first ones. Special tokens stay, and none comes in. So do the start and the end that more than half of
    the rows have, such as a system prompt and `Answer:`, for the model is asked between them. The tokens are no
    targets: they are no text.
    """
    beginnings = [ids for ids, _ in _beginnings(retain, len(start), "`scrambled`")]
    frame = common_start(beginnings), common_start([ids[::-1] for ids in beginnings])[::-1]
    draws, special = np.random.default_rng(seed), set(tokenizer.all_special_ids)
    words = np.setdiff1d(np.arange(vocabulary), sorted(special))
    made = []
    for index in draws.integers(len(beginnings), size=num):
        ids = beginnings[index]
        exchanged = (draws.random(len(ids)) < share) & ~np.isin(ids, sorted(special)) & _within(ids, *frame)
        made.append((np.where(exchanged, draws.choice(words, len(ids)), ids).tolist(), True))
    return made


def _within(ids: list[int], start: list[int], end: list[int]) -> np.ndarray:
    """Which tokens are neither of the start nor of the end; all of those that have nothing else."""
    inside = np.ones(len(ids), dtype=bool)
    if len(ids) > len(start) + len(end):
        inside[: len(start)] &= ids[: len(start)] != start
        inside[len(ids) - len(end) :] &= ids[len(ids) - len(end) :] != end
    return inside


def _beginnings(retain: Sequence[Mapping[str, Any]], start: int, asks: str) -> list[Prompt]:
    """The prompt of each tokenized row; where it has none, its first tokens."""
    if not retain:
        raise ValueError(f"replay: {asks} needs a retain set: pass `retain`, or a list of prompts.")
    made = []
    for row in retain:
        ids, labels = row["input_ids"], row["labels"]
        prompt = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)
        made.append((ids[:prompt], True) if prompt > start else (ids[: start + _BEGINNING], False))
    return made
