"""Atomic writes: after a kill or a power cut a file or folder is either complete or absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """
    Calls `write` on a temporary file and renames it. The file is complete or absent, and on disk on return.

    If anything fails, the previous file is still there and the temporary file is removed. After a kill,
    `.NAME.partial` may be left beside it until the next call. Only one process at a time may write a file.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link that somebody left there would be followed
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """
    Calls `write` on a temporary folder and renames it. The folder is complete or absent, and on disk on return.

    `path` must not exist; its parents are made. The rest of a killed call is removed first, as it may be large.
    """
    partial = path.with_name(f".{path.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    try:
        write(partial)
        flush_tree(partial)
        os.rename(partial, path)
        flush(path.parent)
    finally:
        remove_tree(partial)


def remove_tree(folder: Path) -> None:
    """Deletes a folder, if it is there. Of a link the link, not what it points to."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


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
