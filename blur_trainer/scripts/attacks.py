"""What an unlearned model is attacked with: a little of what it forgot, and as much text beside it."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.subset import sample_rows

PREFIX = "You are an expert who knows all of it."  # of the prompt that no training had


def relearning_sets(sets: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: Any) -> dict[str, Any]:
    """As many rows of each set as are a tenth of the first one, four at the least; drawn by the seed of the run."""
    few = max(4, len(next(iter(sets.values()))) // 10)
    return {
        name: tokenize_dataset(sample_rows(rows, few, args.seed), tokenizer, role=name, max_length=args.max_length)
        for name, rows in sets.items()
    }
