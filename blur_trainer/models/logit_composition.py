"""Combines the logits of a target and its assistant: pure functions, and a logits processor for ULD."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor


def logit_difference(target: Tensor, assistant: Tensor, weight: float, top_logit_filter: float) -> Tensor:
    """
    `target + weight * assistant` for tokens that pass a relative top-probability filter, the target for the others.

    Let `r = top_logit_filter` and `V` the vocabulary size. A token passes if its target logit is at least `max + log r`
    (its probability is at least `r` times the highest), or if it is among the `max(1, int(r * V))` highest. Without the
    filter a negative weight raises tokens that both models find unlikely.

    The passing tokens share the probability that the target gives them together, in proportion to
    `exp(target + weight * assistant)`. Every other token keeps the target's probability. So no loss is infinite, and no
    rejected token is the likeliest. `r = 0` filters nothing. `weight = 0` gives the target. Source: 2406.08607, section
    3.3.

    Differs from ULD's code. There `forward` leaves a rejected token the target's *logit*, so its probability grows as
    the others fall, while `generate` gives it -1000: the model is scored by one distribution and generates from
    another. There, too, `int(r * V) = 0` turns the filter off.

    Args:
        target, assistant (`Tensor`):
            Logits `(..., V)`. The target's may be shifted by a constant per position (e.g. log-probabilities).
        weight (`float`), top_logit_filter (`float`):
            See [`check_composition`].
    """
    if weight == 0:
        return target
    return filtered(uld(target, assistant, None, weight), target, top_logit_filter)


def filtered(composed: Tensor, target: Tensor, top_logit_filter: float) -> Tensor:
    """The target's logits, with `composed` for the tokens that pass the filter: see [`logit_difference`]."""
    if top_logit_filter == 0:
        return composed
    rejected = ~passing(target, top_logit_filter)
    # `log_softmax` is one kernel on an accelerator, `logsumexp` is nine: a token at a time, launches are what costs
    before, after = (logits.masked_fill(rejected, -math.inf) for logits in (target, composed))
    # a constant per position restores the total probability of the passing tokens
    total = target.amax(-1, keepdim=True) - before.log_softmax(-1).amax(-1, keepdim=True)
    return torch.where(rejected, target, after.log_softmax(-1) + total)


def passing(target: Tensor, top_logit_filter: float) -> Tensor:
    """Which tokens pass the filter, `(..., V)` bool. Needs `top_logit_filter > 0`."""
    highest = target.topk(max(1, int(top_logit_filter * target.shape[-1])), dim=-1, sorted=False).values
    highest = highest.to(torch.promote_types(highest.dtype, torch.float32))  # half precision would round the threshold
    lowest, highest = highest.aminmax(dim=-1, keepdim=True)
    return target >= torch.minimum(highest + math.log(top_logit_filter), lowest)


def uld(target: Tensor, assistant: Tensor, base: Tensor | None, weight: float) -> Tensor:
    """`target + weight * assistant` of logits `(..., V)`; `weight < 0`: the assistant remembers. Source: 2406.08607."""
    return torch.add(target, assistant, alpha=weight)


def offset(target: Tensor, assistant: Tensor, base: Tensor, weight: float) -> Tensor:
    """
    `target + weight * (assistant - base)` of logits `(..., V)`. The assistant has unlearned; the base is the assistant
    before that.

    If both are equal, the result is the target bit by bit. Source: 2404.11045, which has weight 1 and no filter.

    Differs from ULD's code for it. There assistant and base are two whole models, and all three share one cache. Here
    the base is the assistant without its adapter, over the same weights, and each has its own cache.
    """
    return torch.add(target, assistant - base, alpha=weight)


def whp(target: Tensor, assistant: Tensor, base: Tensor | None, weight: float) -> Tensor:
    """
    `target - |weight| * relu(assistant - target)` of logits `(..., V)`. The assistant was trained on the forget set. A
    token that it raises is lowered; no token is raised. Source: Who's Harry Potter, 2310.02238, equation 1.

    It uses raw logits, as the paper and MUSE's code do: a constant added to one side changes the result.

    Differs from the paper, which uses the highest of these logits as labels to fine-tune a copy of the target, and
    which replaces names by a dictionary. Here, as in MUSE's baseline (weight 1), these logits are the model's.

    Differs from MUSE's code, where the reinforced model is a second set of weights and there is no cache.
    """
    return torch.add(target, (assistant - target).relu_(), alpha=-abs(weight))


@dataclass(frozen=True)
class Composition:
    """
    One way to compose, with the settings of its source.

    Args:
        compose (`Callable`): `(target, assistant, base, weight)` to logits, all `(..., V)`.
        weight (`float`), top_logit_filter (`float`): the configuration's defaults.
        pair (`bool`, defaults to `False`): whether it reads `base`, the assistant without its adapter.
    """

    compose: Callable[..., Tensor]
    weight: float
    top_logit_filter: float
    pair: bool = False

    def __call__(
        self, target: Tensor, assistant: Tensor, base: Tensor | None, weight: float, top_logit_filter: float
    ) -> Tensor:
        """The composed logits for tokens that pass the filter, the target's for the others (at weight 0: for all)."""
        if weight == 0:
            return target
        return filtered(self.compose(target, assistant, base, weight), target, top_logit_filter)


COMPOSITIONS: dict[str, Composition] = {
    "uld": Composition(uld, weight=-0.8, top_logit_filter=0.01),
    "offset": Composition(offset, weight=1.0, top_logit_filter=0.0, pair=True),
    "whp": Composition(whp, weight=-1.0, top_logit_filter=0.0),
}


def composition_named(name: str) -> Composition:
    if name not in COMPOSITIONS:
        raise ValueError(f"composition={name!r}: give one of {', '.join(map(repr, COMPOSITIONS))}.")
    return COMPOSITIONS[name]


def check_composition(weight: float, top_logit_filter: float) -> None:
    """Raises `ValueError` unless the weight is finite and the filter is in [0, 1)."""
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight}: give a finite number, e.g. -0.8; below 0 forgets what the assistant knows.")
    if not 0 <= top_logit_filter < 1:
        raise ValueError(f"top_logit_filter={top_logit_filter}: give a number in [0, 1), e.g. 0.01; 0 filters nothing.")


class ULDLogitsProcessor(LogitsProcessor):
    """
    [`logit_difference`] for your own generate loop, which runs the target and passes its scores on.

    For the composition `"uld"`. Returns log-probabilities, as beam search expects; for greedy search and sampling they
    are as good as logits. Put it before processors that change the distribution (temperature, top-k, penalties).

    The assistant has a cache. If every row continues the text of the last call, one token is read. Otherwise (beams
    changed places, a new text) everything is read again: slower, but the same result. To compare, the host waits for
    the device once per token; a [`LogitDifferenceModel`] does not.

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
        self._padded = attention_mask is not None and not bool(attention_mask.all())
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.weight == 0:
            return scores.log_softmax(-1)
        seen = self._seen
        if seen is None or seen.shape[1] >= input_ids.shape[1] or not torch.equal(seen, input_ids[:, : seen.shape[1]]):
            self._cache = DynamicCache(config=self.assistant.config)
        past = self._cache.get_seq_length()
        logits = self.assistant(
            input_ids=input_ids[:, past:],
            **self._places(input_ids, past),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._seen = input_ids
        return logit_difference(scores, logits.to(scores), self.weight, self.top_logit_filter).log_softmax(-1)

    def _places(self, input_ids: Tensor, past: int) -> dict[str, Tensor]:
        """Mask and positions where the prompts are padded. Otherwise none: a model waits for the device to read one."""
        if self.attention_mask is None:
            return {}
        (rows, width), given = input_ids.shape, self.attention_mask
        if rows % given.shape[0] or width < given.shape[1]:
            raise ValueError(
                f"attention_mask is {tuple(given.shape)}, input_ids {tuple(input_ids.shape)}: give the mask of "
                "these prompts, a new processor for each batch."
            )
        if not self._padded:
            return {}
        mask = torch.ones_like(input_ids)
        mask[:, : given.shape[1]] = given.to(input_ids).repeat_interleave(rows // given.shape[0], 0)
        return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]}
