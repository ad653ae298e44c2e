"""Topics in a trainer: settings, objective and rule of each topic, and the dataset that alternates them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import datasets

from blur_trainer.data.topics import TopicDataset
from blur_trainer.gradients.rules import BLUR, Rule, Sum
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.level import Until
from blur_trainer.objectives.rmu import COEFFICIENT, RMU
from blur_trainer.trainers.config import UnlearningConfig

_SPLITS = {"train", "validation", "test"}


def topic_names(forget: Any) -> tuple[str, ...]:
    """The topics of a forget dataset, if it is a mapping of datasets. A mapping of splits is no topics."""
    return tuple(forget) if isinstance(forget, Mapping) and not is_splits(forget) else ()


def is_splits(dataset: Mapping[str, Any]) -> bool:
    """Whether a mapping holds the splits of one dataset."""
    return isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict) or set(dataset) <= _SPLITS


def settle_topics(
    objectives: dict[str, Objective], rule: Rule, names: tuple[str, ...], args: UnlearningConfig
) -> list[Rule]:
    """Gives the forget objective its topics and returns the rule of each topic. Raises for wrong combinations."""
    if unknown := sorted(set(settings_of(args)) - set(names)):
        have = f"topics {list(names)}" if names else "no topics: give a mapping, topic -> dataset"
        raise ValueError(f"`topics` has settings of {unknown}, but `forget_dataset` has {have}.")
    if names and args.precompute_ref_logps:
        raise ValueError("`precompute_ref_logps=True` does not go with a `forget_dataset` of topics: leave it off.")
    if names and args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` does not go with topics, which alternate in a "
            "fixed order (each shuffled by the seed): leave it out."
        )
    objectives["forget"] = with_topics(objectives["forget"], names, args)
    return rules_by_topic(rule, names, args)


def settings_of(args: UnlearningConfig) -> dict[str, Any]:
    topics: Any = args.topics
    return topics or {}


def with_topics(objective: Objective, topics: tuple[str, ...], args: UnlearningConfig) -> Objective:
    """Gives RMU a vector and a coefficient per topic. Other objectives do not change and accept no coefficient."""
    if isinstance(objective, Until):
        return dataclasses.replace(objective, objective=with_topics(objective.objective, topics, args))
    own = {topic: s["coefficient"] for topic, s in settings_of(args).items() if "coefficient" in s}
    if not isinstance(objective, RMU):
        if own:
            raise ValueError(f"`topics` has a `coefficient` for {sorted(own)}, which is RMU's: {objective} has none.")
        return objective
    if not topics:
        return objective
    common = objective.coefficient
    if common is None and not own:
        return objective.for_topics(topics, None)
    if common is None and objective.own_words and len(own) < len(topics):
        raise ValueError(
            f"`topics` has a `coefficient` for {sorted(own)} alone: with `own_words` give one for each of "
            f"{list(topics)}, or none."
        )
    spread = dict(common) if isinstance(common, Mapping) else dict.fromkeys(topics, common or COEFFICIENT)
    return objective.for_topics(topics, spread | own)


#: rule -> the argument that a topic's `alpha` sets: the weight of retaining
_ALPHA: dict[type, str] = {BLUR: "alpha", Sum: "retain_weight"}


def rules_by_topic(rule: Rule, topics: tuple[str, ...], args: UnlearningConfig) -> list[Rule]:
    """The rule of each topic, in the order of the topics."""
    own = {topic: s["alpha"] for topic, s in settings_of(args).items() if "alpha" in s}
    if not own:
        return [rule] * len(topics)
    if type(rule) not in _ALPHA:
        raise ValueError(f"`topics` has an `alpha` for {sorted(own)}, which is of the rules BLUR and Sum, not {rule}.")
    name = _ALPHA[type(rule)]
    changed: Any = dataclasses.replace
    return [changed(rule, **{name: own[topic]}) if topic in own else rule for topic in topics]


def alternate(forget: Mapping[str, Any], retain: Any, args: UnlearningConfig) -> TopicDataset:
    """The dataset that alternates the topics step by step. It is read sequentially."""
    for role, given in (("forget", forget), ("retain", retain if isinstance(retain, Mapping) else {})):
        for topic, rows in given.items():
            if isinstance(rows, datasets.IterableDataset):
                raise TypeError(
                    f"The `{role}` dataset of {topic!r} is a stream: topics need datasets of known length, so that a "
                    "shortage shows before training. Load it."
                )
    config: Any = args.accelerator_config
    processes = 1 if config.split_batches else args.world_size
    # Trainer takes the accumulation from either place
    accumulation = (config.gradient_accumulation_kwargs or {}).get("num_steps", args.gradient_accumulation_steps)
    block = args.train_batch_size * processes * accumulation
    seed = args.seed if args.data_seed is None else args.data_seed
    steps = args.max_steps if args.max_steps > 0 else None
    return TopicDataset(forget, retain, block, seed, steps, args.repeat_topics)
