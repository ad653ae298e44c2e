"""Files that are whole or not there, and on the disk: what a kill or a power cut must find."""

import os
from collections.abc import Callable
from pathlib import Path


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` puts into the file that it is given: whole or not at all, and on disk when this returns."""
    partial = path.with_name(f"{path.name}.tmp")
    write(partial)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def flush_tree(folder: Path) -> None:
    """Everything in the folder, and that it is there, survives a power cut from now on."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        flush(path)


def flush(path: Path) -> None:
    """One file or folder (which names are in it)."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
