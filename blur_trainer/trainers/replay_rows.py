"""Samples texts from a model, and drops those that repeat a forget set."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.encoding import leading_special_ids
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.repeats import own_runs, repeating, row_texts
from blur_trainer.evaluation.batching import check_context
from blur_trainer.evaluation.distributed import rank_and_world
from blur_trainer.evaluation.sampling import sample_ids
from blur_trainer.evaluation.scoring import special_ids
from blur_trainer.trainers.influence import loss_drops
from blur_trainer.trainers.replay_config import ReplaySettings
from blur_trainer.trainers.replay_prompts import Prompt, prompts, scrambled_prompts

logger = logging.getLogger(__name__)
Row = dict[str, Any]

_RETAIN_ROWS = 500  # of these at most the drops are computed


class NothingToReplay(ValueError):
    """The filters have dropped all texts: a training may go on without them."""


class NoLossFilter(ValueError):
    """A kernel of the model has no forward mode, so the filter by loss cannot run: a training may go on without it."""


class ReplaySets:
    """Forget and retain rows, each of one or more datasets, as texts and as tokens."""

    def __init__(
        self,
        forget: Sequence[Any],
        retain: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
    ):
        self.examples: dict[str, list[Row]] = {"forget": [], "retain": []}
        self.texts: dict[str, list[str]] = {"forget": [], "retain": []}
        for role, rows in [*(("forget", rows) for rows in forget), *(("retain", rows) for rows in retain)]:
            tokenized = tokenize_dataset(rows, tokenizer, role=role, drop_empty=True, **options)
            if not isinstance(tokenized, Dataset):
                raise ValueError(f"The `{role}` dataset is a stream: replay compares texts with all its rows. Load it.")
            self.examples[role] += tokenized.select_columns(["input_ids", "labels"]).to_list()
            self.texts[role] += row_texts(rows, tokenizer, role)

    @property
    def digests(self) -> dict[str, str]:
        """Of the tokens of both sets."""
        found = {}
        for role, examples in self.examples.items():
            digest = hashlib.sha256()
            for example in examples:
                for ids in (example["input_ids"], example["labels"]):
                    digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
            found[role] = digest.hexdigest()
        return found


def replayed(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: ReplaySets,
    num: int,
    settings: ReplaySettings,
    seed: int,
    batch_size: int,
    alone: bool = False,
    desc: str | None = None,
) -> list[Row]:
    """The rows that [`replay`] keeps, equal on all processes. `alone`: only this process calls."""
    if settings.loss_quantile is not None and sets.examples["forget"] and sets.examples["retain"]:
        one = {role: rows[:1] for role, rows in sets.examples.items()}  # before hours of sampling
        _loss_drops(model, one["forget"], one["retain"], special_ids(model, tokenizer)[1], 1)
    rank, world = (0, 1) if alone else rank_and_world()
    how = {"seed": seed, "batch_size": batch_size, "alone": alone, "desc": desc}
    counts: list[str] = []

    def said(begun: Sequence[Prompt], before: Sequence[Row]) -> list[Row]:
        """What the model says after the prompts, and no filter drops."""
        rows = _sampled(model, tokenizer, begun, settings, **how)
        kept: list[Any] = [*_kept(model, tokenizer, rows, sets, settings, batch_size, before)]
        if world > 1:  # a filter at its limit may differ by rounding
            dist.broadcast_object_list(kept)
        if rank == 0:
            logger.warning("%s. %d are kept.", kept[1], len(kept[0]))
        counts.append(kept[1])
        return kept[0]

    start = leading_special_ids(tokenizer)
    rows = said(prompts(tokenizer, start, sets.examples["retain"], num, settings.prompts, seed), [])
    if settings.scrambled and len(rows) < num:
        missing, vocabulary = num - len(rows), min(len(tokenizer), model.config.get_text_config().vocab_size)
        mixed = {"share": settings.scrambled, "vocabulary": vocabulary, "seed": seed}
        rows += said(scrambled_prompts(tokenizer, start, sets.examples["retain"], missing, **mixed), rows)
    if not rows:
        raise NothingToReplay(
            f"{'; '.join(counts)}: none is left to train on. Sample more (`num`), give other `prompts` or a share of "
            "`scrambled` tokens, raise `ngram` or `loss_quantile`, or switch a filter off (`None`)."
        )
    return rows


def _sampled(
    model: Any, tokenizer: PreTrainedTokenizerBase, begun: Sequence[Prompt], settings: ReplaySettings, **how: Any
) -> list[Row]:
    """One text for each prompt. `how`: as of [`~blur_trainer.evaluation.sampling.sample_ids`].

    First a quarter of the tokens of all texts, then the rest of those that have not ended. A batch is written until its
    longest text ends, so a few long texts among many short ones would make all batches long.
    """
    prompt_ids, most = [ids for ids, _ in begun], settings.max_new_tokens
    check_context(model, [len(ids) for ids in prompt_ids], what="prompt", max_new_tokens=most)
    how |= {"num": 1, "temperature": settings.temperature, "top_p": settings.top_p}
    ends, _ = special_ids(model, tokenizer)
    found: list[list[int]] = [[] for _ in prompt_ids]
    going = list(range(len(prompt_ids)))
    for tokens in (most // 4, most - most // 4):
        if not tokens or not going:
            continue
        prompts = [[*prompt_ids[i], *found[i]] for i in going]
        said = [more for (more,) in sample_ids(model, tokenizer, prompts, max_new_tokens=tokens, **how)]
        for index, more in zip(going, said, strict=True):
            found[index] += more
        going = [i for i, more in zip(going, said, strict=True) if len(more) == tokens and more[-1] not in ends]
    return [_row(tokenizer, ids, masked, text) for (ids, masked), text in zip(begun, found, strict=True)]


def _row(tokenizer: PreTrainedTokenizerBase, prompt: list[int], masked: bool, found: list[int]) -> Row:
    ids = [*prompt, *found]
    labels = [*([IGNORE_INDEX] * len(prompt) if masked else prompt), *found]
    said, text = tokenizer.batch_decode([found, ids], skip_special_tokens=True)
    return {"text": text if re.search(r"\w", said) else "", "input_ids": ids, "labels": labels}


def _kept(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    sets: ReplaySets,
    settings: ReplaySettings,
    batch_size: int,
    before: Sequence[Row],
) -> tuple[list[Row], str]:
    """The rows that no filter drops, and that were not there `before`; how many each filter drops, in words."""
    said = [f"replay: {len(rows)} texts were sampled"]

    def keep(good: Sequence[bool], what: str) -> list[Row]:
        said.append(f"{len(good) - sum(good)} {what}")
        return [row for row, stays in zip(rows, good, strict=True) if stays]

    rows = keep([bool(row["text"]) for row in rows], "have no word")
    first = {row["text"]: index for index, row in reversed(list(enumerate(rows)))} | {row["text"]: -1 for row in before}
    rows = keep([first[row["text"]] == index for index, row in enumerate(rows)], "are there twice")
    if settings.ngram is not None:
        runs = own_runs(sets.texts["forget"], sets.texts["retain"], settings.ngram)
        repeats = repeating([row["text"] for row in rows], runs, settings.ngram)
        rows = keep([not each for each in repeats], f"share {settings.ngram} words in a row with the forget set")
    if settings.loss_quantile is not None and sets.examples["retain"] and rows:
        _, pad_id = special_ids(model, tokenizer)
        good = _within_retain(model, rows, sets, settings.loss_quantile, pad_id, batch_size)
        rows = keep(good, "have a loss that falls with the forget set's")
    return rows, ", ".join(said)


def _within_retain(
    model: Any, rows: list[Row], sets: ReplaySets, quantile: float, pad_id: int, batch_size: int
) -> list[bool]:
    """Whether each row's loss falls no faster than the quantile of the retain rows' losses."""

    retain = sets.examples["retain"][:: -(-len(sets.examples["retain"]) // _RETAIN_ROWS)]
    drops = _loss_drops(model, sets.examples["forget"], [*retain, *rows], pad_id, batch_size)
    highest = torch.quantile(drops[: len(retain)].double(), quantile)
    return (drops[len(retain) :] <= highest).tolist()


def _loss_drops(model: Any, forget: Sequence[Row], others: Sequence[Row], pad_id: int, batch_size: int) -> torch.Tensor:
    """Of whole texts: each token is a target."""

    def whole(examples: Sequence[Mapping[str, Any]]) -> list[Row]:
        return [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in examples]

    try:
        return loss_drops(model, whole(forget), whole(others), pad_id, batch_size)
    except NotImplementedError as error:
        raise NoLossFilter(
            "replay's filter by loss needs forward-mode differentiation, which a kernel of the model does not have: "
            "load it with `attn_implementation='sdpa'` or `'eager'`, without Liger kernels and 4- or 8-bit weights, "
            f"or set `loss_quantile=None`. ({str(error).splitlines()[0]})"
        ) from error
