"""Model -> arrays: the only forward passes in evaluation. Of several processes, all must call these functions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

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

    Examples of similar length share a batch, padded on the right under their true attention mask, so that the values
    are those of one example at a time. Only the scored positions are normalized, in float32 whatever the model's dtype.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped causal language model, whole or as FSDP2 and ZeRO-3 hold it. It is scored in evaluation mode; each
            module's mode is restored.
        examples (`Sequence[dict]`):
            `{"input_ids": list[int], "labels": list[int]}`, equally long, labels -100 where nothing is scored.
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
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        scored = [_label_logps(logits[row], rows[i][1]) for row, i in enumerate(indices)]
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

    Prompts of similar length share a batch, padded on the left under their true attention mask. The tokenizer and the
    model's configurations are left as they were; a tokenizer without a pad token needs none.

    Greedy means greedy: of the model's own generation configuration only the end-of-sequence ids are used, so that a
    checkpoint's sampling, beams or repetition penalty cannot enter a benchmark.

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
            A continuation ends before the first of these strings; a row that has written one is not continued.
        desc (`str`, *optional*):
            Label of the progress bar; no bar when left out.

    Returns:
        `list[str]`: The continuations, without their prompts, in the given order.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    stops = check_stop_strings(stop_strings)
    prompt_ids = encode_prompts(tokenizer, prompts)
    check_context(model, [len(ids) for ids in prompt_ids], what="prompt", max_new_tokens=max_new_tokens)
    config = _greedy_config(model, tokenizer, max_new_tokens)
    synced = is_sharded(model)  # then a process whose rows have ended runs on while the others' have not

    def run(indices: list[int]) -> list[str]:
        ids, mask = pad([prompt_ids[i] for i in indices], config.pad_token_id, "left", model.device)
        width = ids.shape[1]
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, stops, width)] if stops else []),
            synced_gpus=synced,
        )
        return [_decode(tokenizer, row, config.eos_token_id, stops) for row in output[:, width:].tolist()]

    with evaluating(model), _generation_config(model, config), gathering_in_generate(model):
        return in_shares(model, buckets([len(ids) for ids in prompt_ids], batch_size), run, desc)


@contextmanager
def _generation_config(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    # `generate` fills whatever the given configuration leaves at None from the model's own: hide that one.
    # Every owner among the modules, because wrappers (PEFT) copy theirs to the model inside.
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    own_configs = [vars(module)["generation_config"] for module in owners]
    for module in owners:
        module.generation_config = config  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, own in zip(owners, own_configs, strict=True):
            module.generation_config = own


def _greedy_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    own = getattr(model, "generation_config", None)
    eos = tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else [int(token) for token in eos]
    pad_id = tokenizer.pad_token_id
    if pad_id is None:  # masked in prompts and cut from answers: any id does
        pad_id = eos_ids[0] if eos_ids else 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=eos_ids or None,
    )


class _Stops(StoppingCriteria):
    """Marks the rows whose decoded continuation holds one of the strings (exact on text, whatever the tokenizer)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop_strings, self.width = tokenizer, stop_strings, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :].tolist(), skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_ids: list[int] | None, stops: Sequence[str]) -> str:
    ends = [ids.index(eos) for eos in eos_ids or [] if eos in ids]
    text = tokenizer.batch_decode([ids[: min(ends, default=len(ids))]], skip_special_tokens=True)[0]
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _label_logps(logits: Tensor, labels: list[int]) -> Tensor:
    """Float32 log-probabilities (number of scored labels,) from one example's logits (T, V)."""
    positions = [t for t in range(1, len(labels)) if labels[t] != -100]
    index = torch.tensor(positions, dtype=torch.long, device=logits.device)
    targets = torch.tensor([labels[t] for t in positions], dtype=torch.long, device=logits.device)
    rows = logits[index - 1].float()
    return rows.gather(-1, targets[:, None]).squeeze(-1) - rows.logsumexp(-1)
