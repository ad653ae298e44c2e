"""Replay: texts that the model before unlearning says itself, as retain data."""

import dataclasses
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.chat import parse_day
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.replay_config import ReplaySettings
from blur_trainer.trainers.replay_rows import ReplaySets, Row, replayed
from blur_trainer.trainers.retain_sets import Mixture
from blur_trainer.trainers.sampled_file import check_can_answer, kept_or_sampled
from blur_trainer.trainers.topics import topic_names

#: file in `output_dir` with the replayed texts; a resumed training reads them there
REPLAY_NAME = "replay.json"
_TOKENS = List(Value("int64"))
_FEATURES = Features({"text": Value("string"), "input_ids": _TOKENS, "labels": _TOKENS})


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
    scrambled: float = 0.0,
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
        scrambled (`float`, defaults to 0.0):
            Where the filters leave fewer than `num` texts, because a model that knows its texts by heart says the same
            ones again, as many as are missing are sampled from scrambled prompts: those of retain rows (or the first 8
            tokens of their texts), with this share of the tokens exchanged for random ones of the vocabulary. These
            prompts are no targets. 0: no such texts.
        seed (`int`), batch_size (`int`):
            Of the draws; texts at a time. The same two give the same texts on any number of processes.
        max_length (`int`, *optional*, defaults to 1024), qa_template (`str`), day (`date`):
            As of [`tokenize_dataset`], for both sets.

    Returns:
        [`~datasets.Dataset`] with `text`, and with `input_ids` and `labels`, which training reads. All tokens are
        targets, except prompts of retain rows that are none there. To edit texts, keep the column `text` only.

    Raises:
        `ValueError`: no text is left; there is no start; streams; a kernel of the model has no forward mode, which the
        second filter needs; `scrambled` without `retain`.

    Differs from replay of stored training data: the model's own texts need none.
    """
    check_positive(num=num, batch_size=batch_size)
    settings = ReplaySettings(prompts, max_new_tokens, temperature, top_p, ngram, loss_quantile, scrambled)
    options = {"max_length": max_length, "qa_template": qa_template, "day": day}
    sets = ReplaySets([forget], [] if retain is None else [retain], tokenizer, options)
    return _as_dataset(replayed(model, tokenizer, sets, num, settings, seed, batch_size))


def settle_replay(
    forget: Any,
    retain: Any,
    speaker: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearningConfig,
    forgotten: Any = None,
) -> Dataset | None:
    """The replayed texts, if there are to be some: read from `output_dir`, or sampled now. All processes get the same.

    `speaker`: answers the model before unlearning. It is as it was afterwards. `forgotten`: what it forgot before.
    """
    if args.replay is None:
        if forgotten is not None:
            raise ValueError(
                "`forgotten_dataset` filters texts to replay, and nothing is replayed: leave it out, or set `replay`."
            )
        return None
    if retain is None:
        raise ValueError(
            "`replay` adds texts to the retain set, and there is none: pass `retain_dataset`. (Texts that "
            "`blur_trainer.replay` makes may be the whole of it.)"
        )
    if tokenizer is None:
        raise ValueError("`replay` samples texts, and there is no tokenizer: pass `processing_class`.")
    model, settings = speaker(), args.build_replay()
    check_can_answer(model, "pass texts made by `blur_trainer.replay` in `retain_dataset`")
    options = {
        "max_length": setup.context_length(model, args.max_length),
        "qa_template": args.qa_template,
        "day": parse_day(args.chat_template_date),
    }
    never = _listed(forget) + ([] if forgotten is None else _listed(forgotten))
    sets = ReplaySets(never, _listed(retain), tokenizer, options)
    record = {
        **sets.digests,
        "settings": {"replay": args.replay, **dataclasses.asdict(settings), "seed": args.seed},
    }

    def sampled(alone: bool) -> list[Row]:
        batch_size, desc = args.per_device_eval_batch_size, None if args.disable_tqdm else "Replay"
        return replayed(model, tokenizer, sets, args.replay or 0, settings, args.seed, batch_size, alone, desc)

    return _as_dataset(kept_or_sampled(REPLAY_NAME, record, model, args, sampled))


def _listed(given: Any) -> list[Any]:
    """The datasets of a role as the user gave them: of topics or sets by name all, without what ULD adds to retain."""
    if isinstance(given, Mixture):
        parts = given.parts[:1] if given.balanced else given.parts
        return [each for part in parts for each in _listed(part)]
    return list(given.values()) if topic_names(given) else [given]


def _as_dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_list(list(rows), features=_FEATURES)
