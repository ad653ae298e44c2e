"""What a training is made of, as its checkpoints say it: compared before a training is continued.

A record is `{"fixed": {name: value}, "free": {name: value}}`, made by `trainers.record`. Values are plain JSON. With
another `fixed` value it would be another training, or the checkpoint's value would silently stay: that is refused.
Another `free` value is taken, and named in a warning. A name that only one of two records has is not compared.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
SETS = ("the forget set", "the retain set")  # their names in `fixed`
UNKNOWN = "unknown"  # a value that cannot be compared


def check_run(path: Path, recorded: Mapping[str, Any] | None, present: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the checkpoint `path` is of another training; warns of settings that have changed.

    Args:
        recorded: the record of the checkpoint. `None`: it has none, which is warned of.
        present: the record of the training that is to continue it.
    """
    if recorded is None:
        logger.warning(
            "%s does not say what it was trained with (a plain Trainer or an earlier blur_trainer wrote it): take care "
            "that model, data and settings are those of that training.",
            path,
        )
        return
    before, now = recorded.get("fixed", {}), present["fixed"]
    if other := _differences(before, now):
        forget, retain = SETS
        if forget in other and (before[forget], before[retain]) == (now[retain], now[forget]):
            other = {name: text for name, text in other.items() if name not in SETS}
            other = {"sets": "forget set and retain set are swapped", **other}
        raise ValueError(
            f"{str(path)!r} is of another training: {'; '.join(other.values())}. Pass what that training had. Or begin "
            f"another training from its weights: pass that folder as `model`, and another `output_dir`."
        )
    if changed := _differences(recorded.get("free", {}), present["free"]):
        logger.warning("Resuming from %s with other settings: %s.", path, "; ".join(changed.values()))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text, of each value that differs."""
    return {
        name: f"{name} was {before[name]} and is {now[name]}"
        for name in before
        if name in now and before[name] != now[name] and UNKNOWN not in (before[name], now[name])
    }
