"""Conversations as people have them (ShareGPT, lists of strings, JSON in a cell) -> messages with answers."""

import json
from collections.abc import Iterator
from typing import Any

from blur_trainer.data.chat import Messages
from blur_trainer.data.files import is_json
from blur_trainer.data.rows import is_blank

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **{"system": "system", "tool": "tool"},
}
# What chat templates read of a message beside its role and content.
_READ = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


def to_messages(value: Any, where: str) -> Messages:
    """
    Messages `{"role", "content"}` of `{"from", "value"}`, of strings that take turns (the first is the user's), or of
    the JSON of such a list.

    Raises `ValueError` for anything else.
    """
    if isinstance(value, str) and is_json(value, list):
        value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(turn, (dict, str)) for turn in value):
        written = " (Python's way of writing it: save the table as JSON lines instead)" if _of_python(value) else ""
        raise ValueError(f"{where} is no list of messages, but a {type(value).__name__}{written}.")
    if value and all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(value)]
    return [_message(turn, f"message {i} of {where}") for i, turn in enumerate(value)]


def _of_python(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[{'")


def _message(turn: Any, where: str) -> dict[str, Any]:
    given = turn if isinstance(turn, dict) else {}
    role = given.get("role") or given.get("from")
    if not isinstance(role, str) or role.casefold() not in _ROLES:
        raise ValueError(f"{where} has the role {role!r}: known are {', '.join(map(repr, _ROLES))}.")
    content = given.get("content", given.get("value"))
    if isinstance(content, list):  # parts; one that is text says the same as a string
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError(
                f"{where} has {len(content)} parts: give its text as one string, without pictures or sound."
            )
        content = texts[0]
    return {"role": _ROLES[role.casefold()], "content": content} | {k: given[k] for k in _READ if given.get(k)}


def answered(messages: Messages) -> Iterator[Messages]:
    """The conversation up to each of its answers. Training takes the last message as the target, so each gets a row."""
    for i, message in enumerate(messages):
        asked = i > 0 and messages[i - 1]["role"] in ("user", "tool", "assistant")
        if message["role"] == "assistant" and asked and not is_blank(message["content"] or ""):
            yield messages[: i + 1]


__all__ = ["answered", "to_messages"]
