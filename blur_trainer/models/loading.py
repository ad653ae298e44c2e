"""A causal language model by name or path: all of it, its configuration, or only its lower layers."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from trl.trainer.utils import create_model_from_path

from blur_trainer.models.truncation import quarter, shortened

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


def load_pretrained(name: str, kwargs: Any) -> Any:
    """A causal language model by name or path, safetensors only."""
    try:
        architecture: Any = AutoModelForCausalLM
        return create_model_from_path(name, architecture, **{"device_map": None, "use_safetensors": True, **kwargs})
    except OSError as error:
        raise cannot_load(name, error) from error


def cannot_load(name: str, error: OSError) -> OSError:
    return OSError(
        f"Cannot load model {name!r}: no such local folder, no such hub repository, a gated one (ask for access on "
        f"its page, then `hf auth login`), or no safetensors weights in it. {error}"
    )


def read_config(name: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model given by name, or the one in the arguments of `from_pretrained`."""
    given = kwargs.get("config")
    if given is not None:
        return given
    try:
        return AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in _HUB if key in kwargs})
    except OSError as error:
        raise cannot_load(name, error) from error


def load_lower(name: str, config: PreTrainedConfig, num_layers: int | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Loads only the first `num_layers` layers (`None`: a quarter), norm and head of a model given by name."""
    lower = shortened(config, quarter(config) if num_layers is None else num_layers)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # no report about the unused weights of the upper layers
    try:
        model, info = load_pretrained(name, {**kwargs, "config": lower, "output_loading_info": True})
    finally:
        logging.set_verbosity(before)
    if info["missing_keys"]:
        raise ValueError(f"{name!r} has no weights for {sorted(info['missing_keys'])[:3]}: it is not a whole model.")
    return model
