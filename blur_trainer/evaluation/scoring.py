"""All forward passes of evaluation: a model in, arrays out. All processes must call these functions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from blur_trainer.evaluation.batch_scores import Positions, ScoredRow, batch_logps
from blur_trainer.evaluation.batching import (
    buckets,
    check_context,
    check_example,
    check_positive,
    check_stop_strings,
    encode_prompts,
    pad,
)
from blur_trainer.evaluation.distributed import gathering_in_generate, in_shares, is_sharded
from blur_trainer.evaluation.stopping import StopStrings
from blur_trainer.evaluation.token_scores import scored_positions
from blur_trainer.models.forward import evaluating


def token_logps(
    model: PreTrainedModel,
    examples: Sequence[dict[str, Any]],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    desc: str | None = None,
) -> list[np.ndarray]:
    r"""
    Log-probabilities, in nats, of the label tokens of each example:
    $\ell_t = \log p_\theta(y_t \mid x_{<t})$ for every $t \ge 1$ with $y_t \ne -100$.

    Examples of similar length share a batch, padded on the right with the true attention mask. So the values are those
    of one example at a time. Only scored positions are normalized, always in float32.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped causal language model, whole or as FSDP2 and ZeRO-3 hold it. It is scored in evaluation mode; each
            module's mode is restored.
        examples (`Sequence[dict]`):
            `{"input_ids": list[int], "labels": list[int]}` of equal length. Labels of -100 are not scored.
        pad_token_id (`int`):
            Any id of the vocabulary: what fills the masked positions.
        batch_size (`int`, *optional*, defaults to `16`):
            Examples per forward pass.
        desc (`str`, *optional*):
            Label of the progress bar; no bar when left out.

    Returns:
        `list[np.ndarray]`: For each example, in the given order, a float32 array of shape (number of scored labels,);
        of shape (0,) for an example without any. A label at position 0 has no context and is not scored.
    """
    check_positive(batch_size=batch_size)
    if not isinstance(pad_token_id, int):
        raise TypeError(
            f"`pad_token_id` must be an integer, got {pad_token_id!r}. Padding is masked: without a pad token, pass "
            "the id of any other, such as `tokenizer.eos_token_id`."
        )
    rows = [check_example(index, example) for index, example in enumerate(examples)]
    check_context(model, [len(input_ids) for input_ids, _ in rows], what="example")

    def run(indices: list[int]) -> list[np.ndarray]:
        input_ids, attention_mask = pad([rows[i][0] for i in indices], pad_token_id, "right", model.device)
        labels = [rows[i][1] for i in indices]
        on_accelerator = input_ids.device.type != "cpu"
        positions = Positions([_scored_row(row) for row in labels], input_ids.device) if on_accelerator else None
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        if positions is not None:
            return batch_logps(logits, positions)
        scored = [_label_logps(*pair) for pair in zip(logits, labels, strict=True)]
        parts = torch.cat(scored).cpu().split([len(part) for part in scored])
        return [part.numpy().copy() for part in parts]

    with evaluating(model):
        return in_shares(model, buckets([len(input_ids) for input_ids, _ in rows], batch_size), run, desc)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    stop_strings: Sequence[str] | None = None,
    desc: str | None = None,
) -> list[str]:
    """
    Greedy continuation of each prompt.

    Prompts of similar length share a batch, padded on the left with the true attention mask. The tokenizer and the
    model's configurations do not change. The tokenizer needs no pad token.

    Decoding is always greedy: of the model's generation configuration only the end-of-sequence ids are used. So a
    checkpoint's sampling, beams or repetition penalty do not influence a benchmark.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped model with `generate`, whole or as FSDP2 and ZeRO-3 hold it. It runs in evaluation mode; each
            module's mode is restored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Special tokens are added to the prompts and skipped in the answers.
        prompts (`Sequence[str]`):
            Texts to continue.
        max_new_tokens (`int`):
            Longest continuation.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per call of `generate`.
        stop_strings (`Sequence[str]`, *optional*):
            A continuation ends before the first of these strings. Rows that contain one are not continued.
        desc (`str`, *optional*):
            Label of the progress bar; no bar when left out.

    Returns:
        `list[str]`: The continuations, without their prompts, in the given order.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    stops = check_stop_strings(stop_strings)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "desc": desc}
    rows = generate_ids(model, tokenizer, encode_prompts(tokenizer, prompts), stop_strings=stops, **how)
    return [decoded(tokenizer, row, None, stops) for row in rows]


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    stop_strings: Sequence[str] | None = None,
    ends: Sequence[int] = (),
    beams: int = 1,
    processors: Sequence[LogitsProcessor] = (),
    desc: str | None = None,
) -> list[list[int]]:
    """
    As [`generate`], from tokens to tokens: each continuation up to the end of the sequence, which is left out.

    Args:
        prompt_ids: the tokens of each prompt, special tokens included.
        ends: tokens that end an answer beside those of the model's generation configuration.
        beams: of a beam search; 1 is greedy.
        processors: what changes the scores of the next token.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    stops = check_stop_strings(stop_strings)
    check_context(model, [len(ids) for ids in prompt_ids], what="prompt", max_new_tokens=max_new_tokens)
    config = _greedy_config(model, tokenizer, max_new_tokens, ends, beams)
    synced = is_sharded(model)  # then a process continues until the rows of all processes have ended

    def run(indices: list[int]) -> list[list[int]]:
        ids, mask = pad([prompt_ids[i] for i in indices], config.pad_token_id, "left", model.device)
        width = ids.shape[1]
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, stops, width)] if stops else []),
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=synced,
        )
        return [until(row, config.eos_token_id) for row in output[:, width:].tolist()]

    with evaluating(model), generation_config(model, config), gathering_in_generate(model):
        return in_shares(model, buckets([len(ids) for ids in prompt_ids], batch_size), run, desc)


@contextmanager
def generation_config(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Inside, `generate` uses this configuration alone."""
    # `generate` fills None values of the given configuration from the model's own, so hide the model's.
    # Hide it in every module that has one, because wrappers (PEFT) copy theirs to the inner model.
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    own_configs = [vars(module)["generation_config"] for module in owners]
    for module in owners:
        module.generation_config = config  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, own in zip(owners, own_configs, strict=True):
            module.generation_config = own


def _greedy_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, ends: Sequence[int], beams: int
) -> GenerationConfig:
    eos_ids, pad_id = special_ids(model, tokenizer)
    eos_ids = list(dict.fromkeys([*eos_ids, *ends]))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=beams,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=eos_ids or None,
    )


def special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The end-of-sequence ids, those of the model's configuration first, and an id to pad with."""
    own = getattr(model, "generation_config", None)
    eos = tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else [int(token) for token in eos]
    pad_id = tokenizer.pad_token_id
    if pad_id is None:  # masked in prompts and cut from answers, so any id will do
        pad_id = eos_ids[0] if eos_ids else 0
    return eos_ids, pad_id


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_ids: list[int] | None, stops: Sequence[str]) -> str:
    """The text of generated tokens up to the end of the sequence, or to a stop string."""
    text = tokenizer.batch_decode([until(ids, eos_ids)], skip_special_tokens=True)[0]
    for stop in stops:
        text = text.split(stop)[0]
    return text


def until(ids: list[int], eos_ids: Sequence[int] | None) -> list[int]:
    """The tokens before the first end of the sequence."""
    ends = [ids.index(eos) for eos in eos_ids or [] if eos in ids]
    return ids[: min(ends, default=len(ids))]


def _scored_row(labels: list[int]) -> ScoredRow:
    positions = scored_positions(labels)
    return ScoredRow([t - 1 for t in positions], [labels[t] for t in positions])


def _label_logps(logits: Tensor, labels: list[int]) -> Tensor:
    """Float32 log-probabilities (number of scored labels,) from one example's logits (T, V)."""
    positions = scored_positions(labels)
    index = torch.tensor(positions, dtype=torch.long, device=logits.device)
    targets = torch.tensor([labels[t] for t in positions], dtype=torch.long, device=logits.device)
    rows = logits[index - 1].float()
    return rows.gather(-1, targets[:, None]).squeeze(-1) - rows.logsumexp(-1)
