"""What the settings of a training may be: types by their annotations, ranges by the table below."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from blur_trainer.checks import check_fields, check_value

#: field -> where its number must be. Settings of `TrainingArguments` that fail, or mean nothing, inside `train()`
RANGES = {
    # ours
    **dict.fromkeys(("gamma", "alpha"), "[0, inf)"),
    **dict.fromkeys(("forget_weight", "retain_weight"), "(-inf, inf)"),
    "mask_share": "(0, 1)",
    **dict.fromkeys(("sam_rho", "retain_bound"), "(0, inf)"),
    **dict.fromkeys(("max_skipped_steps", "dataset_num_proc", "num_assistant_layers"), "[1, inf)"),
    **dict.fromkeys(("mask_batches", "replay"), "[1, inf)"),
    "max_length": "[2, inf)",  # one token to predict from
    # Trainer's
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), "[1, inf)"),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "eval_delay"), "[0, inf)"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "[0, 1)"),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), "(0, inf)"),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), "[0, inf)"),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb"), "[1, inf)"),
    "max_grad_norm": "[0, inf]",
    **dict.fromkeys(("seed", "data_seed"), "[0, 4294967295]"),  # what NumPy's generator takes
}
#: Trainer itself takes more than these annotations say: `fsdp=True`, `resume_from_checkpoint=True`
_MORE = ("fsdp", "resume_from_checkpoint")
#: what may be set per topic
TOPIC_SETTINGS = {"alpha": (float, "[0, inf)"), "coefficient": (float, "(0, inf)"), "max_length": (int, "[2, inf)")}


def check_settings(args: TrainingArguments) -> None:
    """
    Types and ranges of every setting of a training, before anything is loaded or written.

    Raises:
        TypeError, ValueError: names the setting, what was given, and what is accepted.
    """
    for name in ("output_dir", "logging_dir"):
        if isinstance(getattr(args, name, None), os.PathLike):
            setattr(args, name, os.fspath(getattr(args, name)))
    check_fields(args, RANGES, skipped=_MORE)
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, or -1 for `num_train_epochs`, got {args.max_steps}.")
    if args.max_steps == -1 and args.num_train_epochs <= 0:
        raise ValueError(f"`num_train_epochs` must be above 0, got {args.num_train_epochs}: nothing would be trained.")


def check_topics(topics: Any) -> None:
    """Raises `TypeError` or `ValueError` for settings that no topic can have; before any data is there."""
    for topic, settings in (topics or {}).items():
        what = f"topics[{topic!r}]"
        if not isinstance(settings, Mapping):
            raise ValueError(f"`{what}` must be a dict such as {{'alpha': 800}}, got {settings!r}.")
        if unknown := sorted(set(settings) - set(TOPIC_SETTINGS)):
            raise ValueError(f"`{what}` takes no {unknown}; accepted: {', '.join(TOPIC_SETTINGS)}.")
        for name, value in settings.items():
            kind, interval = TOPIC_SETTINGS[name]
            check_value(f"{what}[{name!r}]", value, (kind,), interval)
