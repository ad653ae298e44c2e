"""The teacher of a distillation: a model composed of a target and an assistant. Its target is the one to be trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from trl import ModelConfig

from blur_trainer.models.loading import cannot_load
from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.origin import Place, find
from blur_trainer.pipeline.methods import DISTILL


def target_of(name: str, hub: dict[str, Any]) -> Place:
    """Where the target of the composed model is.

    Args:
        name: folder or hub id of what ULD, offset or WHP saved.
        hub: arguments of downloads.

    Raises:
        `ValueError`: it is a model of its own, or its target is another one than it was made of.
        `OSError`: there is no such model, or its target is not there.
    """
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError as error:
        raise cannot_load(name, error) from error
    if stored.get("model_type") != LogitDifferenceConfig.model_type:
        raise ValueError(
            f"`distill` writes a composed model into ordinary weights, such as ULD saves, and {name!r} is a "
            f"{stored.get('model_type')!r}: its weights are ordinary already."
        )
    if not stored.get("target"):
        raise ValueError(f"{name!r} does not name its target: write `target` into its config.json.")
    beside = Path(name) if Path(name).is_dir() else None
    return find(stored["target"], (stored.get("origins") or {}).get(stored["target"]), beside, "target")


def parted(method: str, model_args: ModelConfig, hub: dict[str, Any]) -> tuple[str | None, ModelConfig]:
    """The teacher's name, if the method has one, and the options of the model that is trained."""
    if method != DISTILL:
        return None, model_args
    teacher = str(model_args.model_name_or_path)
    if model_args.model_revision != "main":
        raise ValueError(
            f"`distill` reads the newest {teacher!r}: leave `model_revision` out, or download that revision and name "
            "its folder."
        )
    place = target_of(
        teacher, {key: value for key, value in hub.items() if key not in ("revision", "trust_remote_code")}
    )
    return teacher, replace(model_args, model_name_or_path=place.name, model_revision=place.revision or "main")
