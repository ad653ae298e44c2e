"""Finds before training what would make `save_pretrained` raise after it: a configuration that cannot be saved."""

import copy
import logging
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_saveable(model: PreTrainedModel | PeftModel) -> None:
    """
    Raises `ValueError` if the model's configuration or generation configuration cannot be saved.

    Flags of sampling without `do_sample` (`generation_config.json` of Llama-2 and others) are mended: `do_sample=True`,
    as transformers advises and TOFU's code does, with a warning. Of a `PeftModel` only the adapter is saved.
    """
    if isinstance(model, PeftModel):
        return
    with TemporaryDirectory() as folder:
        error = _error_of(lambda: model.config.save_pretrained(folder))
    if error:
        raise ValueError(
            f"The model's configuration cannot be saved, so the trained model could not be either: {error} Load the "
            "model, change its `config`, and pass it."
        )
    generation: Any = getattr(model, "generation_config", None)
    # transformers saves an unchanged one in any state, but Trainer sets the tokenizer's special tokens in it
    if generation is None or not (error := _error_of(lambda: generation.validate(strict=True))):
        return
    sampling = copy.deepcopy(generation)
    sampling.do_sample = True
    if _error_of(lambda: sampling.validate(strict=True)):
        raise ValueError(
            f"The model's generation configuration cannot be saved, so the trained model could not be either: {error} "
            "Load the model, change its `generation_config`, and pass it."
        )
    generation.do_sample = True
    logger.warning(
        "The model's generation configuration has flags of sampling without `do_sample=True`, and cannot be saved so. "
        "`do_sample=True` is set, here and in the saved model. If it should decode greedily, unset these flags. (%s)",
        error,
    )


def _error_of(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except ValueError as error:
        return " ".join(str(error).split())
    return None
