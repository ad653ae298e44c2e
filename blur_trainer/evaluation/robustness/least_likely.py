"""Answers of the least likely tokens: what was pushed down too far lies at the bottom, where nobody looks."""

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.scoring import special_ids


class LeastLikely(LogitsProcessor):
    r"""
    Turns a search around: with it, a greedy search takes the token of the least probability at each step, and a beam
    search looks for the sequence $y$ with the greatest $-\sum_t \log p(y_t)$.

    Special tokens, tokens that end an answer, and ids that the tokenizer has not are never taken, so an answer is as
    long as it may be. Tokens that no training has seen are unlikely everywhere, and hide what was pushed down.

    Our reading of "inverse greedy" search over an answer (2608.29943, whose code we have not seen).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        ends, _ = special_ids(model, tokenizer)
        self._never = sorted({*tokenizer.all_special_ids, *ends})
        self._size = len(tokenizer)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        found = -scores
        found[:, self._never] = -torch.inf
        found[:, self._size :] = -torch.inf
        return found  # type: ignore[return-value]
