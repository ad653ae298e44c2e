"""Replay: texts that the model before unlearning says itself, without those that repeat the forget set."""

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.encoding import leading_special_ids
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.repeats import own_runs, repeating, row_texts
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.distributed import rank_and_world
from blur_trainer.evaluation.sampling import sample_ids
from blur_trainer.evaluation.scoring import special_ids
from blur_trainer.trainers.influence import loss_drops
from blur_trainer.trainers.replay_config import RETAIN_PROMPTS, ReplaySettings

logger = logging.getLogger(__name__)
Row = dict[str, Any]

_TOKENS = List(Value("int64"))
_FEATURES = Features({"text": Value("string"), "input_ids": _TOKENS, "labels": _TOKENS})
_BEGINNING = 8  # tokens of a retain text that a replayed one begins with
_RETAIN_ROWS = 500  # of these at most the drops are computed


def replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num: int,
    forget: Any,
    retain: Any = None,
    prompts: Sequence[str] | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    ngram: int | None = 5,
    loss_quantile: float | None = 0.95,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = 1024,
    qa_template: str = "Question: {question}\nAnswer:",
    day: date | None = None,
) -> Dataset:
    r"""
    Texts that the model before unlearning says itself, as retain data: they protect what neither set mentions.

    Dropped are texts without a word, texts that were there before, and what repeats the forget set:

    * texts that share `ngram` words in a row with the forget set and not with the retain set;
    * texts whose loss falls faster than that of nearly all retain rows when a small step lowers the forget set's loss
      ([`~blur_trainer.trainers.influence.loss_drops`]): above the quantile `loss_quantile` of the retain rows' drops.

    How many are dropped by what is logged.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model before unlearning, whole, on the device where it is to run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        num (`int`):
            Texts to sample. Fewer are kept.
        forget, retain (datasets or lists of dicts):
            Both sets, in the formats of [`tokenize_dataset`]. Without `retain`, the second filter is left out.
        prompts (list of `str` or `"retain"`, *optional*):
            What texts begin with, taken in turn. `"retain"`: the prompts of the retain rows, or the first 8 tokens of
            their texts. Default: the tokenizer's BOS, the start of any text. Give prompts such as `["Question:"]` if
            the tokenizer has no BOS, or if all training texts begin alike.
        max_new_tokens (`int`, defaults to 128), temperature, top_p (`float`, default to 1.0):
            Of the sampling. A text that does not end by itself is cut, and trained on without an end.
        ngram (`int`, *optional*, defaults to 5), loss_quantile (`float`, *optional*, defaults to 0.95):
            Of the two filters. `None` switches one off.
        seed (`int`), batch_size (`int`):
            Of the draws; texts at a time. The same two give the same texts on any number of processes.
        max_length (`int`, *optional*, defaults to 1024), qa_template (`str`), day (`date`):
            As of [`tokenize_dataset`], for both sets.

    Returns:
        [`~datasets.Dataset`] with `text`, and with `input_ids` and `labels`, which training reads. All tokens are
        targets, except prompts of retain rows that are none there. To edit texts, keep the column `text` only.

    Raises:
        `ValueError`: no text is left; there is no start; streams. `NotImplementedError`: a kernel of the model has no
        forward mode, which the second filter needs.

    Differs from replay of stored training data: the model's own texts need none.
    """
    check_positive(num=num, batch_size=batch_size)
    settings = ReplaySettings(prompts, max_new_tokens, temperature, top_p, ngram, loss_quantile)
    options = {"max_length": max_length, "qa_template": qa_template, "day": day}
    sets = ReplaySets(forget, retain, tokenizer, options)
    return as_dataset(replayed(model, tokenizer, sets, num, settings, seed, batch_size))


class ReplaySets:
    """Forget and retain rows, as texts and as tokens."""

    def __init__(self, forget: Any, retain: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]):
        given = {"forget": forget} if retain is None else {"forget": forget, "retain": retain}
        self.examples, self.texts = {}, {"retain": list[str]()}
        for role, rows in given.items():
            tokenized = tokenize_dataset(rows, tokenizer, role=role, drop_empty=True, **options)
            if not isinstance(tokenized, Dataset):
                raise ValueError(f"The `{role}` dataset is a stream: replay compares texts with all its rows. Load it.")
            self.examples[role] = tokenized.select_columns(["input_ids", "labels"]).to_list()
            self.texts[role] = list(row_texts(rows, tokenizer, role))


def as_dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_list(list(rows), features=_FEATURES)


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
    prompts = _prompts(tokenizer, sets, num, settings.prompts, seed)
    sampled = sample_ids(
        *(model, tokenizer, [ids for ids, _ in prompts]),
        num=1,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        batch_size=batch_size,
        alone=alone,
        desc=desc,
    )
    rows = [_row(tokenizer, ids, masked, found) for (ids, masked), (found,) in zip(prompts, sampled, strict=True)]
    kept = [_kept(model, tokenizer, rows, sets, settings, batch_size)]
    if not alone and rank_and_world()[1] > 1:  # a filter at its limit may differ by rounding
        dist.broadcast_object_list(kept)
    return kept[0]


def _prompts(
    tokenizer: PreTrainedTokenizerBase, sets: ReplaySets, num: int, given: Any, seed: int
) -> list[tuple[list[int], bool]]:
    """`num` prompts as tokens, and whether they are no targets."""
    start = leading_special_ids(tokenizer)
    if given == RETAIN_PROMPTS:
        made = [_beginning(example, len(start)) for example in sets.examples.get("retain", [])]
        if not made:
            raise ValueError("replay: `prompts='retain'` needs a retain set: pass `retain`, or a list of prompts.")
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


def _beginning(example: Mapping[str, Any], start: int) -> tuple[list[int], bool]:
    """The prompt of a tokenized row, else its first tokens."""
    ids, labels = example["input_ids"], example["labels"]
    prompt = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    return (ids[:prompt], True) if prompt > start else (ids[: start + _BEGINNING], False)


def _row(tokenizer: PreTrainedTokenizerBase, prompt: list[int], masked: bool, found: list[int]) -> Row:
    ids = [*prompt, *found]
    labels = [*([IGNORE_INDEX] * len(prompt) if masked else prompt), *found]
    said, text = (tokenizer.decode(part, skip_special_tokens=True) for part in (found, ids))
    return {"text": text if re.search(r"\w", said) else "", "input_ids": ids, "labels": labels}


def _kept(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    sets: ReplaySets,
    settings: ReplaySettings,
    batch_size: int,
) -> list[Row]:
    """The rows that no filter drops. Logs what each one drops."""
    said = [f"replay: {len(rows)} texts were sampled"]

    def keep(good: Sequence[bool], what: str) -> list[Row]:
        said.append(f"{len(good) - sum(good)} {what}")
        return [row for row, stays in zip(rows, good, strict=True) if stays]

    rows = keep([bool(row["text"]) for row in rows], "have no word")
    first = {row["text"]: index for index, row in reversed(list(enumerate(rows)))}
    rows = keep([first[row["text"]] == index for index, row in enumerate(rows)], "are there twice")
    if settings.ngram is not None:
        runs = own_runs(sets.texts["forget"], sets.texts["retain"], settings.ngram)
        repeats = repeating([row["text"] for row in rows], runs, settings.ngram)
        rows = keep([not each for each in repeats], f"share {settings.ngram} words in a row with the forget set")
    if settings.loss_quantile is not None and "retain" in sets.examples and rows:
        _, pad_id = special_ids(model, tokenizer)
        good = _within_retain(model, rows, sets, settings.loss_quantile, pad_id, batch_size)
        rows = keep(good, "have a loss that falls with the forget set's")
    logger.warning("%s. %d are kept.", ", ".join(said), len(rows))
    if not rows:
        raise ValueError(
            f"{', '.join(said)}: none is left to train on. Sample more (`num`), give other `prompts`, raise `ngram` or "
            "`loss_quantile`, or switch a filter off (`None`)."
        )
    return rows


def _within_retain(
    model: Any, rows: list[Row], sets: ReplaySets, quantile: float, pad_id: int, batch_size: int
) -> list[bool]:
    """Whether each row's loss falls no faster than the quantile of the retain rows' losses."""

    def whole(examples: Sequence[Mapping[str, Any]]) -> list[Row]:
        return [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in examples]

    retain = sets.examples["retain"][:: -(-len(sets.examples["retain"]) // _RETAIN_ROWS)]
    try:
        drops = loss_drops(model, whole(sets.examples["forget"]), whole([*retain, *rows]), pad_id, batch_size)
    except NotImplementedError as error:
        raise NotImplementedError(
            "replay's filter by loss needs forward-mode differentiation, which a kernel of the model does not have: "
            "load it with `attn_implementation='sdpa'` or `'eager'`, without Liger kernels and 4- or 8-bit weights, or "
            f"set `loss_quantile=None`. ({str(error).splitlines()[0]})"
        ) from error
    highest = torch.quantile(drops[: len(retain)].double(), quantile)
    return (drops[len(retain) :] <= highest).tolist()
