"""Keeps access tokens out of files, logs and trackers."""

from collections.abc import Mapping
from typing import Any

_NAMES = {"token", "hub_token", "hf_token", "use_auth_token", "auth_token", "access_token", "api_key", "password"}


def without_tokens(item: Any) -> Any:
    """`item` with every token in it, at any depth, replaced by its name, `<TOKEN>`, as Trainer does with `hub_token`.

    What is no text (`True`: the token of `hf auth login`) is no secret and stays.
    """
    if isinstance(item, Mapping):
        return {key: _hidden(key) if _is_token(key, value) else without_tokens(value) for key, value in item.items()}
    if isinstance(item, list | tuple) and type(item) in (list, tuple):
        return type(item)(without_tokens(value) for value in item)
    return item


def _is_token(key: Any, value: Any) -> bool:
    return isinstance(value, str) and str(key).lower() in _NAMES


def _hidden(key: Any) -> str:
    return f"<{str(key).upper()}>"
