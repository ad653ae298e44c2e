"""The shape of the largest batch that a training may see, known before its data."""

from typing import Any

from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.topics import settings_of


def longest_example(args: UnlearningConfig, config: Any) -> int | None:
    """Tokens of the longest example (with topics: of the longest topic). `None`: nothing limits it."""
    own = [int(settings["max_length"]) for settings in settings_of(args).values() if "max_length" in settings]
    longest = max([args.max_length, *own]) if args.max_length else None
    lengths = [n for n in (longest, getattr(config, "max_position_embeddings", None)) if n]
    return min(lengths) if lengths else None
