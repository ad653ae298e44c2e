"""Loads the models that a logit-difference model names, if they are still those that it was made of."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.origin import find

HUB = ("cache_dir", "force_download", "local_files_only", "token")
ADAPTER = "assistant"  # a subfolder: beside config.json AutoModel would take it for an adapter of the whole model
_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, f"{ADAPTER}/adapter_*"]


def own_folder(name: str, **hub: Any) -> Path:
    """The folder of a logit-difference model; of a hub id its download."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=_FILES, **hub))


def adapter_inside(folder: Path) -> str | None:
    """The subfolder with the assistant's adapter. `None`: it is in the folder itself, where Trainer resumes from it."""
    inside = None if (folder / ADAPTER_CONFIG_NAME).exists() else ADAPTER
    if not (folder / (inside or "") / ADAPTER_SAFE_WEIGHTS_NAME).is_file():  # PEFT would look for a pickle then
        raise FileNotFoundError(f"{str(folder / (inside or ''))!r} has no {ADAPTER_SAFE_WEIGHTS_NAME}: not complete.")
    return inside


def named_model(
    config: LogitDifferenceConfig, what: str, beside: Path | None, own_name: str, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """
    The model that the configuration names, in safetensors.

    Args:
        config: of a logit-difference model.
        what: `target` or `assistant`.
        beside: the folder of the configuration, if it is a local one.
        own_name: folder or hub id of the configuration.
        kwargs: for `from_pretrained`. `trust_remote_code` is about this model, not about the one that names it.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False: pickled weights can run code, so only safetensors are loaded.")
    name = str(getattr(config, what))
    place = find(name, (config.origins or {}).get(name), beside, what)
    if place.name == own_name:
        raise ValueError(f"{what} {name!r} is the logit-difference model itself: pass `{what}=`.")
    at = {} if place.revision is None else {"revision": place.revision}
    stored, _ = PreTrainedConfig.get_config_dict(place.name, **at, **{key: kwargs[key] for key in HUB if key in kwargs})
    if stored.get("model_type") == config.model_type:  # it could name itself, without end
        raise ValueError(
            f"{what} {place.name!r} is itself a logit-difference model: name the model that it is made of."
        )
    try:
        return AutoModelForCausalLM.from_pretrained(place.name, **at, **{**kwargs, "use_safetensors": True})
    except ValueError as error:
        if kwargs["trust_remote_code"] or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{what} {place.name!r} comes with code. If you trust it, pass `trust_target_remote_code=True`: trust in "
            f"the model that names it does not count. {error}"
        ) from error
