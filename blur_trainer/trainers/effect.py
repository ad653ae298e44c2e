"""Refuses settings with which a training would change no weight, before it begins."""

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

import datasets
from accelerate.logging import get_logger

from blur_trainer.gradients.rules import BLUR, Rule, Sum
from blur_trainer.trainers.config import UnlearningConfig

logger = get_logger(__name__)
#: rule -> the arguments that are the weights of both gradients
_WEIGHTS: dict[type, tuple[str, str]] = {BLUR: ("gamma", "alpha"), Sum: ("forget_weight", "retain_weight")}


def check_effect(args: UnlearningConfig, rules: Iterable[Rule], own_optimizer: bool, retain: bool) -> None:
    """Raises `ValueError` if no step could change a weight. (`trainers.ranges`: if there is no step.)

    A learning rate of 0 only gives a warning: gradients and losses can be looked at without training.

    Args:
        args: of the trainer.
        rules: all that it uses, one per topic.
        own_optimizer: the user's, which has its own learning rate.
        retain: whether there is a retain set.
    """
    idle = [f"the rule {rule} gives no gradient a weight" for rule in rules if _weightless(rule, retain)]
    if args.learning_rate == 0 and not own_optimizer:
        logger.warning("`learning_rate` is 0: losses and gradients will be logged, and no weight will change.")
    if idle:
        raise ValueError(f"Nothing would be trained: {idle[0]}. Pass a positive number.")


def settings_read(args: UnlearningConfig, unread: Collection[str] = ()) -> set[str]:
    """
    The settings that a training reads: without the weights of other rules than its own.

    Args:
        args: of the trainer.
        unread: the settings in whose place the trainer was given an object.
    """
    own = _WEIGHTS.get(type(args.build_rule()), ())
    of_others = {name for names in _WEIGHTS.values() for name in names} - set(own)
    return {each.name for each in fields(args)} - of_others - set(unread)


def _weightless(rule: Rule, retain: bool) -> bool:
    names: tuple[str, ...] = _WEIGHTS.get(type(rule), ())
    if isinstance(rule, Sum) and not retain:
        names = names[:1]
    return bool(names) and all(getattr(rule, name) == 0 for name in names)


def check_batches(args: UnlearningConfig, forget: Any) -> None:
    """Raises `ValueError` if `dataloader_drop_last` drops all batches. A stream's length is not known."""
    if not args.dataloader_drop_last or not isinstance(forget, datasets.Dataset):
        return
    config: Any = args.accelerator_config
    processes = 1 if config.split_batches else args.world_size
    if len(forget) // args.train_batch_size // processes == 0:
        raise ValueError(
            f"Nothing would be trained: `dataloader_drop_last=True` drops the last batch, and {len(forget)} forget "
            f"examples are less than one batch of {args.train_batch_size} on each of {processes} process(es); lower "
            "`per_device_train_batch_size`, or leave it off."
        )
