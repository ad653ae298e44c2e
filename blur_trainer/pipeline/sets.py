"""A role's rows as the options name them, and dataclasses from options: what all commands on one's own data share."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blur_trainer.data.chat import has_chat_template, with_chat_template
from blur_trainer.data.reading import Reading, read_rows
from blur_trainer.models.loading import check_place


def made(of: Any, given: Mapping[str, Any]) -> Any:
    """The dataclass, of those options that are its fields."""
    names = {each.name for each in fields(of) if each.init}
    return of(**{name: value for name, value in given.items() if name in names})


def read_tokenizer(name: str, chat_template: str, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """
    The tokenizer beside a model, with the chat template that was chosen.

    Args:
        name: of the model, or of a tokenizer alone.
        hub: where and how it is read.

    Raises:
        `OSError`: there is none. `ValueError`: of the template.
    """
    check_place(name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name!r} has no tokenizer that can be loaded: name one by `tokenizer` (`--tokenizer`). "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return with_chat_template(tokenizer, chat_template)


def read_set(
    role: str,
    script: Any,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    drop_empty: bool = False,
    rows: Any = None,
) -> Reading:
    """
    Args:
        role: of the set, a field of `script`, which says where the rows are.
        source: a `SourceArguments`.
        rows: where the rows are, if another field says it.

    Raises what [`read_rows`] raises.
    """
    return read_rows(
        getattr(script, role) if rows is None else rows,
        role=role,
        has_template=has_chat_template(tokenizer),
        columns=getattr(source, f"{role}_columns"),
        limit=source.limit,
        drop_empty=drop_empty,
        config=getattr(source, f"{role}_config"),
        split=getattr(source, f"{role}_split"),
    )
