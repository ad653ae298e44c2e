"""Files and folders that are whole or not there, and on the disk: what a kill or a power cut must find."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """
    The file that `write` makes at the path it is given: whole or not at all, and on disk when this returns.

    If anything fails, the previous file is still there and nothing lies beside it; after a kill, `.NAME.partial` may,
    until the next call. One process at a time writes a file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """
    A new folder with all that `write` puts into the one it is given: whole or not at all, and on disk when this
    returns.

    `path` must not exist, its parents need not. What a killed call left is removed first: it may be large.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        flush_tree(partial)
        os.rename(partial, path)
        flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
