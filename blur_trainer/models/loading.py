"""A causal language model by name or path: all of it, its configuration, or only its lower layers."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file, logging
from trl.trainer.utils import create_model_from_path

from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.suitable import check_loadable
from blur_trainer.models.truncation import quarter, shortened

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")
_PLACE = ("subfolder", "gguf_file", "code_revision")


def hub_arguments(kwargs: Any) -> dict[str, Any]:
    """Those of the arguments of a model's `from_pretrained` that its configuration and tokenizer need too.

    `trust_remote_code` is `False` unless given: left open, the auto classes ask on stdin.
    """
    return {"trust_remote_code": False} | {key: kwargs[key] for key in _HUB if key in kwargs}


def check_place(name: str, what: str = "model") -> None:
    """
    Raises `OSError` for a name that is no folder and can be none on the Hub, so that the Hub need not be asked.

    Args:
        what: the name is of, for the message.
    """
    path = Path(name)
    if not name.strip():  # an unset variable of a shell; as a path it would be the current folder
        raise OSError(f"The name of the {what} is empty: give a folder, or a name on the Hub.")
    if path.is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OSError(
            f"Cannot load {what} {name!r}: there is no folder {path.absolute()}, and names on the Hub are `name` or "
            "`user/name`. Check the path."
        ) from error
    if path.is_file():
        raise OSError(f"Cannot load {what} {name!r}: that is a file. Name the folder which it is in.")


def check_model(name: str, kwargs: dict[str, Any]) -> None:
    """Raises what [`read_config`] raises, but not for an adapter: that can be measured, too. No weight is read."""
    check_place(name)
    where = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
    try:
        found = find_adapter_config_file(name, **where)
    except OSError as error:
        raise cannot_load(name, error) from error
    if found is None:
        read_config(name, kwargs)


def load_pretrained(name: str, kwargs: Any) -> Any:
    """A causal language model by name or path, safetensors only.

    Raises:
        `ValueError`: it is an adapter, no causal language model, or its weights are not all there.
        `OSError`: it is not found, or cannot be read.
    """
    config = read_config(name, kwargs)
    check_loadable(config, f"model {name!r}")
    # a logit-difference model passes its arguments on to the models that it names
    whole = not isinstance(config, LogitDifferenceConfig)
    model, info = _load(name, kwargs | ({"output_loading_info": True} if whole else {}), whole)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):  # a repository that holds both
        _refuse_adapter(name, kwargs)
    if missing := sorted(info.get("missing_keys", ())):
        raise ValueError(
            f"{name!r} has no weights for {', '.join(missing[:3])}{' ...' if missing[3:] else ''} ({len(missing)} "
            f"tensors of `{type(model).__name__}`), which would be random: it is not a whole causal language model (a "
            "classifier, a model without its head, or a damaged folder?). Pass one that is."
        )
    return model


def _load(name: str, kwargs: dict[str, Any], with_info: bool) -> tuple[Any, dict[str, Any]]:
    options = {"device_map": None, "use_safetensors": True, "trust_remote_code": False, **kwargs}
    try:
        architecture: Any = AutoModelForCausalLM
        loaded: Any = create_model_from_path(name, architecture, **options)
    except OSError as error:
        raise cannot_load(name, error) from error
    except SafetensorError as error:
        raise OSError(
            f"Cannot load model {name!r}: a safetensors file in it is damaged or cut off. {_line(error)}"
        ) from error
    return loaded if with_info else (loaded, {})


def cannot_load(name: str, error: OSError) -> OSError:
    return OSError(
        f"Cannot load model {name!r}: no such local folder, no such hub repository, a gated one (ask for access on "
        f"its page, then `hf auth login`), or no safetensors weights in it. {_line(error)}"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_config(name: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model given by name, or the one in the arguments of `from_pretrained`."""
    given = kwargs.get("config")
    if given is not None:
        return given
    check_place(name)
    hub = hub_arguments(kwargs) | {key: kwargs[key] for key in _PLACE if key in kwargs}
    if Path(name).is_dir():
        _refuse_adapter(name, hub)
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except OSError as error:
        if not Path(name).is_absolute():
            _refuse_adapter(name, hub)  # a repository of an adapter alone has no configuration of a model
        raise cannot_load(name, error) from error
    except ValueError as error:  # code that came with the model, or an architecture that nobody knows
        raise ValueError(f"Cannot load model {name!r}: {_line(error)}") from error


def _refuse_adapter(name: str, hub: dict[str, Any]) -> None:
    """`from_pretrained` would put the adapter into its base, where a second one replaces it without a word."""
    where = {key: hub[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in hub}
    try:
        found = find_adapter_config_file(name, subfolder=hub.get("subfolder", ""), **where)
    except OSError as error:
        raise cannot_load(name, error) from error
    if found is not None:
        raise ValueError(
            f"{name!r} is an adapter, not a whole model. Merge it into its base first, "
            f"`blur_trainer.merge_and_save({name!r}, 'merged')`, and pass 'merged'. To go on training this very "
            f"adapter, pass `peft.AutoPeftModelForCausalLM.from_pretrained({name!r}, is_trainable=True)`."
        )


def load_lower(name: str, config: PreTrainedConfig, num_layers: int | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Loads only the first `num_layers` layers (`None`: a quarter), norm and head of a model given by name."""
    lower = shortened(config, quarter(config) if num_layers is None else num_layers)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # no report about the unused weights of the upper layers
    try:
        return load_pretrained(name, {**kwargs, "config": lower})
    finally:
        logging.set_verbosity(before)
