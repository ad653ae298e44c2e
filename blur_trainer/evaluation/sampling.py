"""Several sampled continuations of each prompt, the same for a seed on any number of processes."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from blur_trainer.evaluation.batching import buckets, check_context, check_positive, check_stop_strings
from blur_trainer.evaluation.distributed import gathering_in_generate, in_shares, is_sharded
from blur_trainer.evaluation.prompt_cache import Prompts, can_share_prompts
from blur_trainer.evaluation.scoring import decoded, generation_config, special_ids
from blur_trainer.evaluation.stopping import StopStrings
from blur_trainer.models.forward import evaluating


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    *,
    num: int,
    stop_strings: Sequence[str] | None = None,
    **kwargs: Any,
) -> list[list[str]]:
    """
    Samples `num` continuations of each prompt, as texts.

    Args:
        stop_strings:
            As of [`~blur_trainer.evaluation.scoring.generate`].
        model, tokenizer, prompt_ids, num, **kwargs:
            As of [`sample_ids`].

    Returns:
        `list[list[str]]`: The continuations of each prompt, without it, in the given order.
    """
    stops = check_stop_strings(stop_strings)
    found = sample_ids(model, tokenizer, prompt_ids, num=num, stop_strings=stops, **kwargs)
    eos_ids, _ = special_ids(model, tokenizer)
    return [[decoded(tokenizer, row, eos_ids, stops) for row in rows] for rows in found]


def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    *,
    num: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    stop_strings: Sequence[str] | None = None,
    ends: Sequence[int] = (),
    share_prompts: bool = False,
    alone: bool = False,
    desc: str | None = None,
) -> list[list[list[int]]]:
    """
    Samples `num` continuations of each prompt, as tokens.

    Each batch has random numbers of its own, drawn from the seed, the batch's prompts and the number of earlier batches
    with the same prompts. So the texts do not depend on the number of processes, and the caller's random numbers stay
    as they were. They do depend on `batch_size`, and on the kind of device. Of the model's generation configuration
    only the end-of-sequence ids are used: no top-k, no penalties.

    Args:
        model, tokenizer, max_new_tokens, stop_strings, desc:
            As of [`~blur_trainer.evaluation.scoring.generate`]. Rows that contain a stop string are not continued.
        prompt_ids (`Sequence[list[int]]`):
            The tokens of each prompt, special tokens included.
        num (`int`):
            Continuations per prompt.
        temperature, top_p (`float`):
            The logits are divided by the first. Only the likeliest tokens that reach the second together are drawn.
        seed (`int`):
            Of the draws.
        batch_size (`int`):
            Continuations at a time, at least those of one prompt.
        ends (`Sequence[int]`):
            Tokens that end a continuation beside those of the model's generation configuration.
        share_prompts (`bool`):
            Reads each prompt once for all its continuations, if the model's cache allows it
            ([`~blur_trainer.evaluation.prompt_cache.can_share_prompts`]). Then, too, no more than `batch_size`
            continuations are written at a time. The draws are the same; logits differ by rounding. So the texts are
            those of `share_prompts=False`, where that holds all continuations of a prompt in one batch.
        alone (`bool`):
            Only this process calls. Otherwise all processes call, and share the prompts.

    Returns:
        `list[list[list[int]]]`: The tokens of each prompt's continuations, up to the end-of-sequence token. Those that
        ended by themselves have it.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens, num=num)
    stops = check_stop_strings(stop_strings)
    check_context(model, [len(ids) for ids in prompt_ids], what="prompt", max_new_tokens=max_new_tokens)
    config = _config(model, tokenizer, max_new_tokens, temperature, top_p, ends)
    batches = buckets([len(ids) for ids in prompt_ids], max(1, batch_size // num))
    seeds = _seeds(seed, [[prompt_ids[i] for i in indices] for indices in batches])
    seed_of = {indices[0]: own for indices, own in zip(batches, seeds, strict=True)}
    most = batch_size if share_prompts else num

    def run(indices: list[int]) -> list[list[list[int]]]:
        rows = [prompt_ids[i] for i in indices]
        with _own_draws(model.device):
            torch.manual_seed(seed_of[indices[0]])
            prompts = Prompts(model, rows, config.pad_token_id, shared)
            found: list[list[list[int]]] = [[] for _ in rows]
            for count in (min(most, num - start) for start in range(0, num, most)):
                written = _continued(model, tokenizer, prompts.repeated(count), config, stops)
                for index, kept in enumerate(found):
                    kept += written[index * count : (index + 1) * count]
        return found

    with evaluating(model), generation_config(model, config), gathering_in_generate(model):
        # for all batches alike: with sharded parameters all processes need equally many forward passes
        shared = share_prompts and min(map(len, prompt_ids), default=0) > 1 and can_share_prompts(model)
        return in_shares(model, batches, run, desc, alone=alone)


def _config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: Sequence[int],
) -> GenerationConfig:
    eos_ids, pad_id = special_ids(model, tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=0,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(dict.fromkeys([*eos_ids, *ends])) or None,
    )


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    config: GenerationConfig,
    stops: tuple[str, ...],
) -> list[list[int]]:
    """One continuation of each row, without the row."""
    width = inputs["input_ids"].shape[1]
    output = model.generate(  # type: ignore[operator]
        **inputs,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, stops, width)] if stops else []),
        # sharded: then a process continues until the rows of all processes have ended
        synced_gpus=is_sharded(model),
    )
    return [_ended(row, config.eos_token_id or []) for row in output[:, width:].tolist()]


def _ended(ids: list[int], eos_ids: list[int]) -> list[int]:
    """The tokens up to the first end-of-sequence token, which stays. Behind it is padding."""
    ends = [ids.index(eos) for eos in eos_ids if eos in ids]
    return ids[: min(ends) + 1] if ends else ids


def _own_draws(device: torch.device) -> AbstractContextManager[None]:
    """Inside, random numbers may be seeded anew; afterwards the caller's go on."""
    if device.type in ("cpu", "mps"):  # torch cannot set aside those of an mps device
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def _seeds(seed: int, batches: Sequence[Sequence[list[int]]]) -> list[int]:
    """The seed of each batch. Batches with the same prompts have different ones."""
    seen: Counter[str] = Counter()
    seeds = []
    for rows in batches:
        earlier = seen[repr(rows)]
        seen[repr(rows)] += 1
        digest = hashlib.sha256(repr((seed, rows, earlier) if earlier else (seed, rows)).encode()).digest()
        seeds.append(int.from_bytes(digest[:7], "big"))
    return seeds
