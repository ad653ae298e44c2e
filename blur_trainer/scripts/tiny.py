"""The tiny models of a run without a model's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.toy.memorize import memorized


def memorized_models(known: Mapping[Path, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """
    The names of models that know texts by heart: the folder of each, with what it is to know.

    From now on this process computes in one thread: a second one waits longer than it works on so small a model.
    """
    torch.set_num_threads(1)
    rows = {
        folder: tokenize_dataset(texts, tokenizer, role=folder.name, max_length=max_length)
        for folder, texts in known.items()
    }
    return [memorized(folder, tokenizer, texts) for folder, texts in rows.items()]
