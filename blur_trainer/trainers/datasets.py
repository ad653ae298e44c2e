"""Tokenizes and pairs the user's datasets for the trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.grouping import GroupedDataset
from blur_trainer.data.pairing import PairedDataset, PairedIterableDataset
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.effect import check_batches
from blur_trainer.trainers.topics import alternate, settings_of, topic_names

Tokenized: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Mixture:
    """Several datasets for one role, each in its own format. `balanced`: shorter ones are repeated."""

    parts: tuple[Any, ...]
    balanced: bool = False

    def joined(self, parts: list[Tokenized]) -> Tokenized:
        if any(isinstance(part, datasets.IterableDataset) for part in parts):
            parts = [p.to_iterable_dataset() if isinstance(p, datasets.Dataset) else p for p in parts]
        if self.balanced:
            return datasets.interleave_datasets(parts, stopping_strategy="all_exhausted")
        return datasets.concatenate_datasets(parts)


def tokenize_all(
    forget: Any,
    retain: Any,
    evaluation: Any,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearningConfig,
    forget_objective: Objective,
) -> tuple[Any, Any, Tokenized | dict[str, Tokenized] | None]:
    """Tokenizes every dataset to `input_ids` and `labels`. Adds refusals to the forget set if its objective needs them.

    If the forget set is a mapping of topics to datasets, the result is one too. Then the retain set may also be one.
    """
    topics = topic_names(forget)
    if args.precompute_ref_logps and any(isinstance(d, datasets.IterableDataset) for d in (forget, retain)):
        raise ValueError(
            "`precompute_ref_logps=True` needs datasets of known length, not a stream, which is not gone over twice: "
            "leave it off, or load the datasets."
        )

    def tokenize(dataset: Any, role: str, refusals: bool = False, longest: int | None = args.max_length) -> Tokenized:
        if isinstance(dataset, Mixture):
            return dataset.joined([tokenize(part, role, refusals) for part in dataset.parts])
        return tokenize_dataset(
            dataset,
            tokenizer,
            role=role,
            max_length=setup.context_length(model, longest),
            drop_empty=args.drop_empty,
            refusals=refusals,
            seed=args.seed,
            qa_template=args.qa_template,
            num_proc=args.dataset_num_proc,
            vocab_size=setup.vocabulary_size(model),
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
        tokenized_forget = by_topic(forget, "forget", forget_objective.needs_refusal)
        tokenized_retain = None if retain is None else by_topic(retain, "retain")
        if isinstance(evaluation, Mapping):
            evaluation = {name: tokenize(dataset, f"eval_{name}") for name, dataset in evaluation.items()}
        elif evaluation is not None:
            evaluation = tokenize(evaluation, "eval")
    return tokenized_forget, tokenized_retain, evaluation


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
