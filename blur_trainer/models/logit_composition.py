"""Target logits plus weighted assistant logits: the one rule, and the rule as a processor for any generate loop."""

import math

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor


def logit_difference(target: Tensor, assistant: Tensor, weight: float, top_logit_filter: float) -> Tensor:
    """
    `target + weight * assistant` on the tokens that pass a relative top-probability filter, -inf on the others.

    With `r = top_logit_filter` and a vocabulary of `V` a token passes if its target logit reaches `max + log r` (its
    probability is at least `r` times the highest) or is among the `max(1, int(r * V))` highest: without the filter a
    negative weight raises tokens that neither model believes in. `r = 0` filters nothing. `weight = 0` is the target
    itself, unfiltered. Source: 2406.08607, section 3.3.

    Differs from ULD's code: there, `forward` leaves a rejected token the target's logit while `generate` gives it
    -1000, so that a model is scored by another distribution than it speaks from, and `int(r * V) = 0` turns the filter
    off. Here rejected is -inf everywhere: probability 0, and a loss of inf where a label is rejected.

    Args:
        target, assistant (`Tensor`):
            Logits `(..., V)`. Those of the target may be shifted by a constant per position (log-probabilities).
        weight (`float`), top_logit_filter (`float`):
            See [`check_composition`].
    """
    if weight == 0:
        return target
    composed = torch.add(target, assistant, alpha=weight)
    if top_logit_filter == 0:
        return composed
    highest = target.topk(max(1, int(top_logit_filter * target.shape[-1])), dim=-1, sorted=False).values
    highest = highest.to(torch.promote_types(highest.dtype, torch.float32))  # half precision would round the threshold
    threshold = torch.minimum(highest.amax(-1) + math.log(top_logit_filter), highest.amin(-1))
    return composed.masked_fill_(target < threshold.unsqueeze(-1), -math.inf)


def check_composition(weight: float, top_logit_filter: float) -> None:
    """`ValueError` unless the weight is finite and the filter in [0, 1)."""
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight}: give a finite number, e.g. -0.8; below 0 forgets what the assistant knows.")
    if not 0 <= top_logit_filter < 1:
        raise ValueError(f"top_logit_filter={top_logit_filter}: give a number in [0, 1), e.g. 0.01; 0 filters nothing.")


class ULDLogitsProcessor(LogitsProcessor):
    """
    The rule of [`logit_difference`] for a generate loop of one's own, which runs the target and hands on its scores.

    Returns log-probabilities, as beam search expects of a processor; for greedy search and sampling that is the same as
    logits. It should come before the processors that bend the distribution (temperature, top-k, penalties).

    The assistant has a cache: as long as every row continues what the last call saw, one token is read. Else (beams
    that changed places, a new text) everything is read again, which is slower and as right.

    Args:
        assistant ([`~peft.PeftModel`]):
            [`lora_assistant`]'s model, in `eval` mode.
        weight (`float`), top_logit_filter (`float`):
            As in [`logit_difference`].
        attention_mask (`Tensor`, *optional*):
            `(B, T)` of the prompts, needed where they are padded, on the left. Rows are repeated for beams.
    """

    def __init__(
        self, assistant: PeftModel, weight: float, top_logit_filter: float, attention_mask: Tensor | None = None
    ) -> None:
        check_composition(weight, top_logit_filter)
        if assistant.training:
            raise ValueError("assistant is in train mode, its dropout on: call assistant.eval() first.")
        self.assistant, self.weight, self.top_logit_filter = assistant, weight, top_logit_filter
        self.attention_mask = attention_mask
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.weight == 0:
            return scores.log_softmax(-1)
        seen = self._seen
        if seen is None or seen.shape[1] >= input_ids.shape[1] or not torch.equal(seen, input_ids[:, : seen.shape[1]]):
            self._cache = DynamicCache(config=self.assistant.config)
        past, mask = self._cache.get_seq_length(), self._mask(input_ids)
        logits = self.assistant(
            input_ids=input_ids[:, past:],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, past:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._seen = input_ids
        return logit_difference(scores, logits.to(scores), self.weight, self.top_logit_filter).log_softmax(-1)

    def _mask(self, input_ids: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids)
        if self.attention_mask is not None:
            (rows, width), given = input_ids.shape, self.attention_mask.to(input_ids)
            if rows % given.shape[0] or width < given.shape[1]:
                raise ValueError(
                    f"attention_mask is {tuple(given.shape)}, input_ids {tuple(input_ids.shape)}: give the mask of "
                    "these prompts, a new processor for each batch."
                )
            mask[:, : given.shape[1]] = given.repeat_interleave(rows // given.shape[0], 0)
        return mask
