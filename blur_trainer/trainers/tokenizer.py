"""The tokenizer of the trained model: the one that was passed, or the one beside the model."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from blur_trainer.models.loading import hub_arguments
from blur_trainer.trainers.config import UnlearningConfig

_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "*.tiktoken", "tekken.json")


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: PreTrainedModel | PeftModel, args: UnlearningConfig
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was passed, else the one beside the model; `None` if there is neither.

    `None` is enough for tokenized datasets; text raises later, naming `processing_class`.

    Raises:
        `ValueError`: there is a tokenizer beside the model, and it cannot be loaded.
    """
    if processing_class is not None:
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError(f"`processing_class` must be a tokenizer, got `{type(processing_class).__name__}`.")
        return processing_class
    name = get_config_model_id(model.config)
    if not name:
        return None
    kwargs: Any = args.model_init_kwargs or {}
    local = Path(name).is_dir()
    if local and not _check_files(Path(name)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, **hub_arguments(kwargs))
    except OSError as error:
        if not local:  # the repository has no tokenizer, or cannot be reached
            return None
        raise _broken(name, error) from error
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise _broken(name, error) from error


def _check_files(folder: Path) -> bool:
    """Whether there are files of a tokenizer. The libraries' errors about broken ones name no file."""
    files = [path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()]
    for path in files:
        if path.suffix != ".json":
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} is no JSON ({error}): the tokenizer beside the model is broken. Save it there anew, or "
                "pass `processing_class`."
            ) from error
    return bool(files)


def _broken(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"The tokenizer beside the model, in {name!r}, cannot be loaded: {' '.join(str(error).split())} Save it there "
        "anew, or pass `processing_class`."
    )
