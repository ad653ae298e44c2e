"""Atomic writes: after a kill or a power cut a file is either complete or absent."""

import os
from collections.abc import Callable
from pathlib import Path


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file and renames it. The file is complete or absent, and on disk on return."""
    partial = path.with_name(f"{path.name}.tmp")
    write(partial)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def flush_tree(folder: Path) -> None:
    """Flushes the folder and all files in it to the disk, so that they survive a power cut."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        flush(path)


def flush(path: Path) -> None:
    """Flushes one file, or the list of names in one folder."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
