"""Tokenizes and pairs the user's datasets for the trainer."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.alternatives import has_alternatives
from blur_trainer.data.chat import parse_day
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.grouping import GroupedDataset
from blur_trainer.data.levels import has_levels
from blur_trainer.data.notices import shown
from blur_trainer.data.overlap import shared_examples
from blur_trainer.data.pairing import PairedDataset, PairedIterableDataset
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers import setup
from blur_trainer.trainers.alternatives import settle_alternatives
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.effect import check_batches
from blur_trainer.trainers.replay import settle_replay
from blur_trainer.trainers.retain_sets import Mixture, RetainSets, Tokenized, with_names
from blur_trainer.trainers.row_columns import named, with_columns
from blur_trainer.trainers.template_day import settle_day
from blur_trainer.trainers.topics import alternate, settings_of, topic_names

logger = logging.getLogger(__name__)


def tokenize_all(
    forget: Any,
    retain: Any,
    evaluation: Any,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearningConfig,
    objectives: Mapping[str, Objective],
    speaker: Callable[[Any], PreTrainedModel | PeftModel],
    forgotten: Any = None,
) -> tuple[Any, Any, Tokenized | dict[str, Tokenized] | None]:
    """Tokenizes every dataset to `input_ids` and `labels`. Adds refusals or alternatives to the forget set if needed.

    If the forget set is a mapping of topics to datasets, the result is one too. Then the retain set may also be one.
    Else a mapping is several retain sets, which are joined. `speaker` answers the model before unlearning, which has
    `forgotten` before.
    """
    topics, forget_objective = topic_names(forget), objectives["forget"]
    _check_sets(args, forget, retain, topics, forget_objective)
    settle_day(args, tokenizer)
    forget = settle_alternatives(forget, model, tokenizer, args, forget_objective)
    retain = _settle_retain(forget, retain, lambda: speaker(model), tokenizer, args, topics, forgotten)

    def tokenize(dataset: Any, role: str, refusals: bool = False, longest: int | None = args.max_length) -> Tokenized:
        if isinstance(dataset, Mixture):
            return dataset.joined([tokenize(part, role, refusals) for part in dataset.parts])
        if isinstance(dataset, RetainSets):
            return dataset.joined(partial(tokenize, longest=longest), role, args.should_log)
        return tokenize_dataset(
            dataset,
            tokenizer,
            role=role,
            max_length=setup.context_length(model, longest),
            refusals=refusals,
            alternatives=refusals and forget_objective.needs_alternatives,
            levels=role.startswith("forget") and forget_objective.needs_level,
            **_options(args, model),
        )

    def by_topic(dataset: Any, role: str, refusals: bool = False) -> Any:
        if not topics or not isinstance(dataset, Mapping):
            return tokenize(dataset, role, refusals)
        lengths = {topic: settings.get("max_length", args.max_length) for topic, settings in settings_of(args).items()}
        return {
            topic: tokenize(rows, f"{role} ({topic})", refusals, lengths.get(topic, args.max_length))
            for topic, rows in dataset.items()
        }

    with args.main_process_first(desc="tokenization"):
        forget = by_topic(forget, "forget", forget_objective.needs_refusal)
        retain = None if retain is None else by_topic(retain, "retain")
        if isinstance(evaluation, Mapping):
            evaluation = {name: tokenize(dataset, f"eval_{name}") for name, dataset in evaluation.items()}
        elif evaluation is not None:
            evaluation = tokenize(evaluation, "eval")
    _say_what_is_trained(forget, retain, tokenizer, args.should_log)
    return *with_columns(forget, retain, objectives), evaluation


def _settle_retain(
    forget: Any,
    retain: Any,
    speaker: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearningConfig,
    topics: tuple[str, ...],
    forgotten: Any,
) -> Any:
    """The retain set with replayed texts and weights, as far as the settings ask for them."""
    replayed = settle_replay(forget, retain, speaker, tokenizer, args, forgotten)
    return with_names(retain, replayed, args.retain_set_weights, topics)


def _say_what_is_not_read(forget: Any, topics: tuple[str, ...], objective: Objective) -> None:
    sets = list(forget.values()) if topics else [forget]
    unread = objective.needs_refusal and not objective.needs_alternatives
    if unread and any(has_alternatives(rows, "forget") for rows in sets):
        logger.warning(
            "The forget set has a column `alternative`, and %s prefers refusals: only `altpo` reads that column.",
            objective,
        )
    if not objective.needs_level and any(not isinstance(s, Mixture) and has_levels(s, "forget") for s in sets):
        logger.warning(
            "The forget set has a column `forget_level`, and %s does not read it: set `forget_level='column'`, or take "
            "the column out.",
            objective,
        )


def _options(args: UnlearningConfig, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """What every set is tokenized with."""
    return {
        "vocab_size": setup.vocabulary_size(model),
        "drop_empty": args.drop_empty,
        "seed": args.seed,
        "qa_template": args.qa_template,
        "num_proc": args.dataset_num_proc,
        "day": parse_day(args.chat_template_date),
    }


def _check_sets(
    args: UnlearningConfig, forget: Any, retain: Any, topics: tuple[str, ...], objective: Objective
) -> None:
    _say_what_is_not_read(forget, topics, objective)
    given = (forget, retain)
    if args.precompute_ref_logps and any(isinstance(d, datasets.IterableDataset) for d in given):
        raise ValueError(
            "`precompute_ref_logps=True` needs datasets of known length, not a stream, which is not gone over twice: "
            "leave it off, or load the datasets."
        )


def _say_what_is_trained(forget: Any, retain: Any, tokenizer: PreTrainedTokenizerBase | None, says: bool) -> None:
    """Logs the first example of each role at INFO, and warns of examples that are to be forgotten and retained."""
    if not says:
        return
    for role, dataset in [*named("forget", forget), *named("retain", retain)]:
        if logger.isEnabledFor(logging.INFO):
            logger.info("The first `%s` example:\n%s", role, shown(next(iter(dataset)), tokenizer))
    for role, dataset in named("forget", forget):
        topic = role.partition(" ")[2]
        for other, kept in named("retain", retain):
            apart = topic and other.partition(" ")[2] not in ("", topic)  # another topic's
            if not apart and isinstance(dataset, datasets.Dataset) and isinstance(kept, datasets.Dataset):
                _warn_of_overlap(dataset, kept, role, other)


def _warn_of_overlap(forget: datasets.Dataset, retain: datasets.Dataset, role: str, other: str) -> None:
    if shared := shared_examples(forget, retain):
        logger.warning(
            "%s of %d `%s` examples are in the `%s` dataset too (the first is example %d): the model is to forget "
            "and to retain them at once. Remove them from one of the two.",
            "All" if len(shared) == len(forget) else str(len(shared)),
            len(forget),
            role,
            other,
            shared[0],
        )


def pair(forget: Any, retain: Any, args: UnlearningConfig) -> torch.utils.data.Dataset:
    """Pairs forget and retain examples. The result is a stream if one input is. Topics take turns."""
    if isinstance(forget, dict):
        return alternate(forget, retain, args)
    check_batches(args, forget)
    seed = args.seed if args.data_seed is None else args.data_seed
    grouped = args.train_sampling_strategy == "group_by_length"
    if isinstance(forget, datasets.Dataset) and not isinstance(retain, datasets.IterableDataset):
        if grouped:
            return GroupedDataset(forget, retain, args.train_batch_size * args.gradient_accumulation_steps, seed)
        return PairedDataset(forget, retain, seed=seed)
    if grouped:
        raise ValueError(
            "`train_sampling_strategy='group_by_length'` needs datasets of known length, and one is a stream: leave it "
            "out, or load the dataset."
        )
    config: Any = args.accelerator_config
    config.dispatch_batches = False  # dispatching would concatenate batches of unequal length
    return PairedIterableDataset(forget, retain, seed=seed)
