"""The output directory: nothing in it is overwritten by accident, nothing is left half-written."""

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

from blur_trainer.atomic_write import flush, flush_tree

T = TypeVar("T")
# what torch, safetensors and Python raise when the disk is full
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
STATE_NAME = "trainer_state.json"
ASSISTANT = "assistant/adapter_model.safetensors"  # of a model unlearned by logit difference
_ADAPTERS = ("adapter_model.safetensors", ASSISTANT)
_RUN_FILES = ("model.safetensors", "model.safetensors.index.json", *_ADAPTERS, STATE_NAME)
_ENTRIES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *_ADAPTERS)
_SHARD = re.compile(r"model(-v\d+)?-\d{5}-of-\d{5}\.safetensors")


def check_output_dir(output_dir: str) -> None:
    """A directory with another run in it is an error: nothing that the user has is overwritten."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {output_dir!r} is a file; pass a directory.")
    found = [name for name in _RUN_FILES if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if found:
        named = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(
            f"output_dir {output_dir!r} already holds a run ({named}). Pass another `output_dir`, or "
            "`resume_from_checkpoint=True` to continue that run, or move it away."
        )


def agreed(act: Callable[[], T], acts: bool) -> T:
    """What the first process answers, on every process; what `act` raises on any that `acts`, on all of them."""
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
    """Before training, not at the first save."""
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
    """What a checkpoint takes at least: of sharded weights this process sees only its part."""
    parameters = [] if model is None else list(model.parameters())
    if isinstance(model, PeftModel):
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    states = getattr(optimizer, "state", None) or {}
    tensors = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *tensors))


def check_space(folder: Path, needed: int) -> None:
    """An error before the first byte is written, if the disk cannot take `needed` bytes."""
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
    """Of a save that broke off: what is left, and what to do."""
    return OSError(
        f"Writing {str(folder)!r} failed ({error}). What was saved before is untouched. If the disk is full or a quota "
        "is used up, make room; then save again, or continue a training with `resume_from_checkpoint=True`."
    )


@contextmanager
def staged(output_dir: str, writes: bool) -> Iterator[str]:
    """A folder to save into, whose files replace those in `output_dir` if nothing failed.

    A kill at any moment leaves a folder that loads the old or the new weights, provided that both are of one
    architecture (`config.json` is replaced first): see `_replace`.
    """
    staging = Path(output_dir) / ".saving"
    if writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
    try:
        yield str(staging)
        if writes and staging.exists():
            _replace(staging, Path(output_dir))
    except WRITE_ERRORS as error:
        raise failed(Path(output_dir), error) from error
    finally:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, target: Path) -> None:
    """Moves all files over, last the one through which the weights are found; then drops old weights.

    `from_pretrained` looks for `model.safetensors`, then for the index. New shards get names that no old shard has, so
    the old index keeps leading to the old ones.
    """
    (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty template: we write a card ourselves
    _rename_shards(staging, target)
    flush_tree(staging)
    new = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
    for name in sorted(new, key=lambda name: (name in _ENTRIES, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target / name)
    flush(target)
    if {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & new:
        shards = [path.name for path in target.iterdir() if _SHARD.fullmatch(path.name)]
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *shards):  # in this order: what leads there goes first
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
