"""One-line errors for a row that does not fit its format. They name the column, the row and the set."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from blur_trainer.data.columns import FORMATS, MASKS

# Arguments of `apply_chat_template` are not variables of the template. A row must not set them.
_RENDERING = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}


def check_row(row: Mapping[str, Any], index: int, fmt: str, role: str, *, has_template: bool) -> None:
    """
    Raise when a field of one row does not fit its format.

    Args:
        row (`Mapping`): Column name to value.
        index (`int`): Position of the row in its dataset, for the message.
        fmt (`str`): Name in `FORMATS`.
        role (`str`): What the dataset is for (`"forget"`, `"retain"`), for the message.
        has_template (`bool`): Whether the tokenizer has a chat template, without which messages cannot be rendered.

    Raises:
        `TypeError`: a field is not a string (or list of messages, or list of token ids).
        `ValueError`: messages without a chat template, or whose last role is not `assistant`; `labels` of another
            length than `input_ids`; text that is no Unicode.
    """
    where = f"row {index} of the `{role}` dataset"
    if fmt == "input_ids":
        return _check_tokens(row, where)
    conversational = fmt == "messages" or (fmt == "prompt-completion" and isinstance(row.get("prompt"), list))
    for column in FORMATS[fmt]:
        if conversational:
            _check_messages(row.get(column), column, where, answer=column != "prompt")
        elif not isinstance(row.get(column), str):
            raise TypeError(f"Column `{column}` in {where} is a {_type(row.get(column))}: it must be a string.")
        _check_unicode(row.get(column), column, where)
    if conversational and not has_template:
        raise ValueError(
            f"The `{role}` dataset holds messages, but the tokenizer has no chat template: set "
            "`tokenizer.chat_template`, or give `prompt` and `completion` as strings."
        )
    if conversational:
        _check_prompt(row["messages"][:-1] if fmt == "messages" else row["prompt"], where)
    _check_template_kwargs(row.get("chat_template_kwargs"), where)


def is_blank(value: Any) -> bool:
    """Whether an answer (a string, or messages) or a text has nothing but white space."""
    if isinstance(value, list):
        return all(
            not message.get("tool_calls") and is_blank(message.get("content") or "") for message in with_texts(value)
        )
    return isinstance(value, str) and not value.strip()


def _check_template_kwargs(kwargs: Any, where: str) -> None:
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"Column `chat_template_kwargs` in {where} is a {_type(kwargs)}: it must be a dict.")
    if wrong := sorted(_RENDERING & set(kwargs)):
        raise ValueError(
            f"Column `chat_template_kwargs` in {where} sets {wrong}, which are arguments of `apply_chat_template` and "
            "no variables of the template: leave them out (a template belongs into `tokenizer.chat_template`, tools "
            "into a column `tools`)."
        )


def _check_unicode(value: Any, column: str, where: str) -> None:
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Column `{column}` in {where} is no Unicode text: character {error.start} is {text[error.start]!r}, "
                "half of a surrogate pair. Decode the file again, with the right encoding."
            ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def _check_prompt(messages: list[dict[str, Any]], where: str) -> None:
    role = messages[-1]["role"] if messages else None
    if role not in ("user", "tool", "assistant"):
        raise ValueError(
            f"The prompt in {where} ends with {'no message' if role is None else f'the role {role!r}'}: an answer "
            "must follow a message of the role 'user', 'tool' or 'assistant'."
        )


def _check_messages(value: Any, column: str, where: str, *, answer: bool) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise TypeError(
            f"Column `{column}` in {where} is a {_type(value)}: it must be a list of messages "
            '`{"role": ..., "content": ...}`, at least one.'
        )
    last = value[-1]
    if answer and last["role"] != "assistant":
        raise ValueError(
            f"The last message of `{column}` in {where} has the role {last['role']!r}: it is the answer, so its role "
            "must be 'assistant'."
        )
    if answer and not (isinstance(last.get("content"), str) or _only_text(last.get("content"))):
        raise TypeError(f"The answer in `{column}` in {where} is a {_type(last.get('content'))}: it must be a string.")
    for number, message in enumerate(value):
        _check_content(message, f"Message {number} of `{column}` in {where}")


def _check_content(message: Mapping[str, Any], which: str) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")) or _only_text(content):
        return
    if isinstance(content, list):
        raise TypeError(
            f"{which} has a content of {len(content)} parts: give its text as one string (one part "
            '`{"type": "text", "text": ...}` will do; pictures and sound are not trained on).'
        )
    raise TypeError(f"{which} has a content of type {_type(content)}: it must be a string.")


def _only_text(content: Any) -> bool:
    """Whether the content is one part, a text, which says the same as the string."""
    return (
        isinstance(content, list)
        and len(content) == 1
        and isinstance(content[0], dict)
        and content[0].get("type") == "text"
        and isinstance(content[0].get("text"), str)
    )


def with_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are strings. Templates for text would write a list of parts as Python code."""
    return [m | {"content": m["content"][0]["text"]} if isinstance(m.get("content"), list) else m for m in messages]


def _check_tokens(row: Mapping[str, Any], where: str) -> None:
    for ids, labels in (("input_ids", "labels"), ("refusal_input_ids", "refusal_labels")):
        masks = ("attention_mask", *MASKS) if ids == "input_ids" else ()
        for column in (ids, labels, *masks):
            if column not in row and column != "input_ids":
                continue
            value = row.get(column)
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise TypeError(f"Column `{column}` in {where} is a {_type(value)}: it must be a list of integers.")
            if column in masks and not set(value) <= {0, 1}:
                raise ValueError(f"Column `{column}` in {where} holds {sorted(set(value))[:5]}: a mask is 0 or 1.")
        for column in (labels, *masks):
            if column in row and len(row[column]) != len(row.get(ids) or []):
                raise ValueError(
                    f"`{column}` has {len(row[column])} entries and `{ids}` {len(row.get(ids) or [])} in {where}: "
                    f"one {'label' if column == labels else 'entry'} per token is needed"
                    f"{', -100 where a token is no target' if column == labels else ''}."
                )


def _type(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"list of {type(value[0]).__name__}"
    return "empty list" if value == [] else type(value).__name__
