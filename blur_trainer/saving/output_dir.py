"""Protects the output directory: nothing is overwritten by accident, nothing is left half-written."""

import errno
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from blur_trainer.atomic_write import flush, flush_tree, remove_tree

T = TypeVar("T")
# torch, safetensors and Python raise these when the disk is full
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
STATE_NAME = "trainer_state.json"
ASSISTANT = "assistant/adapter_model.safetensors"  # the adapter of a logit-difference model
_ADAPTERS = ("adapter_model.safetensors", ASSISTANT)
_RUN_FILES = ("model.safetensors", "model.safetensors.index.json", *_ADAPTERS, STATE_NAME)
_ENTRIES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *_ADAPTERS)
_SHARD = re.compile(r"model(-v\d+)?-\d{5}-of-\d{5}\.safetensors")


def check_output_dir(output_dir: str) -> None:
    """Raises if the directory holds another run, so that nothing of the user's is overwritten."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {output_dir!r} is a file; pass a directory.")
    if found := holds_run(output_dir):
        named = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(
            f"output_dir {output_dir!r} already holds a run ({named}). Pass another `output_dir`, or "
            "`resume_from_checkpoint=True` to continue that run, or move it away."
        )


def holds_run(output_dir: str) -> list[str]:
    """The files and folders of a run that are there."""
    folder = Path(output_dir)
    found = [name for name in _RUN_FILES if (folder / name).exists()]
    return found + sorted(path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def agreed(act: Callable[[], T], acts: bool) -> T:
    """Calls `act` where `acts`. All processes get the first one's result; an error in one is raised in all."""
    answer: Any = None
    error: Exception | None = None
    if acts:
        try:
            answer = act()
        except (OSError, ValueError) as raised:
            error = raised
    outcomes = gather_object([(answer, error)])
    for found in (error, *(other for _, other in outcomes)):
        if found is not None:
            raise found
    return outcomes[0][0]


def check_writable(output_dir: str) -> None:
    """Raises before training, not at the first save, if the directory cannot be written."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir!r} cannot be written ({error}). Nothing has been trained or changed. Pass another "
            "`output_dir`, or make room or give permission there."
        ) from error


def saved_bytes(model: nn.Module | None, optimizer: Any) -> int:
    """Lower bound of a checkpoint's bytes. This process sees only its part of sharded weights."""
    parameters = [] if model is None else list(model.parameters())
    if isinstance(model, PeftModel):
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    states = getattr(optimizer, "state", None) or {}
    tensors = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *tensors))


def check_space(folder: Path, needed: int) -> None:
    """Raises before the first byte is written if the disk has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes about {needed:,} bytes and {free:,} are free. Nothing has been overwritten. Make "
            "room, lower `save_total_limit` (one more than that must fit) or pass another `output_dir`; then continue "
            "with `resume_from_checkpoint=True`",
            str(folder),
        )


def failed(folder: Path, error: BaseException) -> OSError:
    """The error for an interrupted save: what is left, and what to do."""
    return OSError(
        f"Writing {str(folder)!r} failed ({error}). What was saved before is untouched. If the disk is full or a quota "
        "is used up, make room; then save again, or continue a training with `resume_from_checkpoint=True`."
    )


@contextmanager
def staged(output_dir: str, writes: bool) -> Iterator[str]:
    """Yields a folder to save into. If nothing fails, its files replace those in `output_dir`.

    After a kill at any moment `output_dir` loads the old or the new weights, if both have the same architecture
    (`config.json` is replaced first): see `_replace`.
    """
    staging = Path(output_dir) / ".saving"
    if writes:
        remove_tree(staging)  # left by a killed save
    try:
        yield str(staging)
        if writes and staging.exists():
            _replace(staging, Path(output_dir))
    except WRITE_ERRORS as error:
        raise failed(Path(output_dir), error) from error
    finally:
        if writes:
            remove_tree(staging)


def _replace(staging: Path, target: Path) -> None:
    """Moves all files; the file that leads to the weights comes last. Then deletes old weights.

    `from_pretrained` looks for `model.safetensors`, then for the index. New shards get new names, so the old index
    still points to the old shards.
    """
    (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the trainer writes its own card
    _rename_shards(staging, target)
    flush_tree(staging)
    new = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
    for name in sorted(new, key=lambda name: (name in _ENTRIES, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target / name)
    flush(target)
    if {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & new:
        shards = [path.name for path in target.iterdir() if _SHARD.fullmatch(path.name)]
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *shards):  # first those that point to others
            if name not in new:
                (target / name).unlink(missing_ok=True)


def _rename_shards(staging: Path, target: Path) -> None:
    index = staging / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        return
    content = json.loads(index.read_text())
    shards = set(content["weight_map"].values())
    if any((target / name).exists() for name in shards):
        number = next(v for v in itertools.count(2) if not any(target.glob(f"model-v{v}-*")))
        renamed = {name: name.replace("model-", f"model-v{number}-", 1) for name in shards}
        for old, name in renamed.items():
            os.replace(staging / old, staging / name)
        content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
