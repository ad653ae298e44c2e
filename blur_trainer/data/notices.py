"""What a user is told once of each dataset: how its prompts are made, and what the first example looks like."""

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.chat import has_chat_template, notice
from blur_trainer.data.encoding import RowEncoder

logger = logging.getLogger(__name__)

_SHOWN = 600  # characters of a part of an example


def warn_of_prompt(encoder: RowEncoder, row: Mapping[str, Any]) -> None:
    """Warns, by the first row, where the trained prompt is not what the chat template would ask."""
    if encoder.fmt in ("text", "input_ids") or not has_chat_template(encoder.tokenizer):
        return
    rendered = encoder.rendered(row, 0)
    if rendered is None:
        written = any(token in row["prompt"] for token in encoder.tokenizer.all_special_tokens)
        if not written:  # the user has applied a template
            logger.warning(
                "The `%s` dataset has `prompt` and `completion` as strings: they are taken as they are, without the "
                "tokenizer's chat template. If the model is asked through its template, give both as messages "
                '(`[{"role": "user", "content": ...}]`), or `question` and `answer`, as `blur_trainer.read_rows` does.',
                encoder.role,
            )
    elif said := notice(rendered):
        logger.warning("In the `%s` dataset %s.", encoder.role, said)


def shown(example: Mapping[str, Any], tokenizer: Any) -> str:
    """A tokenized example for a reader: what is prompt and what is answer, part by part."""
    lines = _parts(example["input_ids"], example["labels"], tokenizer)
    if "refusal_input_ids" in example:
        lines += ["with a refusal:", *_parts(example["refusal_input_ids"], example["refusal_labels"], tokenizer)]
    return "\n".join(lines)


def _parts(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[str]:
    parts = []
    pairs = list(zip(ids, labels, strict=True))
    # the label of the first token is never predicted
    for is_answer, group in groupby(enumerate(pairs), lambda pair: pair[0] > 0 and pair[1][1] != IGNORE_INDEX):
        tokens = [token for _, (token, _) in group]
        text = str(tokens) if tokenizer is None else repr(tokenizer.decode(tokens))
        text = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        parts.append(f"  {'answer' if is_answer else 'prompt'} ({len(tokens)} tokens): {text}")
    return parts
