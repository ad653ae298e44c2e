"""A name that comes from a file or a user becomes part of a path only if it is one plain file name."""

from typing import Any

_SEPARATORS = '/\\:*?"<>|'  # what leads into other folders, or no system's file may be called
_LONGEST = 200  # bytes: an ending such as `.jsonl` and the prefix of a temporary file must fit beside it


def file_name(name: Any, what: str) -> str:
    """
    `name` itself, which is then safe to append to a folder.

    Raises:
        ValueError: if it is no text, is empty, leads into another folder, is hidden, or holds a control character.
    """
    plain = isinstance(name, str) and name.isprintable() and name == name.strip()
    if not plain or not name or name.startswith(".") or any(sign in name for sign in _SEPARATORS):
        raise ValueError(
            f"{what} {name!r} is no plain file name: it must be text without slashes, without a dot or a space at its "
            "beginning, and without line breaks or any of " + " ".join(_SEPARATORS) + " in it."
        )
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"{what} {name[:40]!r}... is longer than a file may be called: at most {_LONGEST} bytes.")
    return name
