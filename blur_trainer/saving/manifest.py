"""The manifest of a checkpoint, `blur_checkpoint.json`: its files with their checksums, and what the run is made of.

It is `{"files": null}` while the folder is written, and closed when everything is on disk. The checksums (XXH3, 128
bit) find damage, not forgery: a checkpoint that somebody else wrote is not made safe by them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from blur_trainer.atomic_write import atomic_write, flush_tree
from blur_trainer.saving import output_dir as saving

logger = logging.getLogger(__name__)
MANIFEST_NAME = "blur_checkpoint.json"


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint. `files`: name -> bytes and checksum, `None` if it was written by a plain `Trainer`.

    `run`: what the training is made of, see `saving.run_record`; `None` in checkpoints of earlier versions.
    """

    step: int
    files: Mapping[str, tuple[int, str | None]] | None = None
    run: Mapping[str, Any] | None = None


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint folder. `None` if the folder is missing or malformed, or its writing broke off."""
    try:
        step = int(json.loads((path / saving.STATE_NAME).read_text())["global_step"])
        if not (path / MANIFEST_NAME).exists():
            return Manifest(step)
        content = json.loads((path / MANIFEST_NAME).read_text())
        files = {name: _entry(value) for name, value in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    run = content.get("run")
    return Manifest(step, files, run if isinstance(run, dict) else None)


def _entry(value: Any) -> tuple[int, str | None]:
    """Earlier versions wrote the size only."""
    return (int(value["bytes"]), str(value["xxh3_128"])) if isinstance(value, dict) else (int(value), None)


def open_manifest(path: Path) -> None:
    """Says that the folder is being written."""
    _write(path, {"files": None})


def close_manifest(path: Path, run: Mapping[str, Any] | None) -> int:
    """Says that everything in the folder is on disk. Returns its bytes."""
    names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    names.remove(MANIFEST_NAME)
    flush_tree(path)
    sizes = {name: (path / name).stat().st_size for name in names}
    sums = _checksums(path, names)
    _write(path, {"files": {name: {"bytes": sizes[name], "xxh3_128": sums[name]} for name in names}, "run": run})
    return sum(sizes.values())


def _write(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path / MANIFEST_NAME, lambda file: file.write_text(json.dumps(content, indent=1)))


def _checksums(path: Path, names: Iterable[str]) -> dict[str, str]:
    """One thread per file. About 10 GB/s each, so that reading the disk is what takes time."""

    def checksum(name: str) -> str:
        with (path / name).open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    names = list(names)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))


def check_files(path: Path, files: Mapping[str, tuple[int, str | None]]) -> None:
    """Raises `ValueError` if a file is missing or has changed since the checkpoint was saved. Reads all of them."""
    damage = {}
    for name, (size, _) in files.items():
        if not (path / name).is_file():
            damage[name] = "is missing"
        elif (found := (path / name).stat().st_size) != size:
            damage[name] = f"has {found:,} bytes instead of {size:,}"
    if not damage:
        sums = _checksums(path, [name for name, (_, checksum) in files.items() if checksum])
        damage = {name: "has other content" for name, found in sums.items() if found != files[name][1]}
        if len(sums) < len(files):
            logger.warning("%s was saved without checksums: only the sizes of its files are checked.", path)
    if damage:
        listed = [f"{name!r} {what}" for name, what in damage.items()]
        more = ", ..." if len(listed) > 4 else ""
        raise ValueError(
            f"{str(path)!r} has been changed since it was saved: {', '.join(listed[:4])}{more}. Put it back, or move "
            "the folder away and resume from an older checkpoint."
        )
