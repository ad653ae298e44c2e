"""Texts that the model before unlearning says: sampled once at construction, kept in a file of `output_dir`."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blur_trainer.atomic_write import atomic_write
from blur_trainer.models.reference import is_partitioned
from blur_trainer.saving import output_dir as saving
from blur_trainer.saving.checkpoints import last_complete_checkpoint
from blur_trainer.saving.lock import OutputLock
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.cpu import engine_requested
from blur_trainer.trainers.record import model_record


def check_can_answer(model: Any, remedy: str) -> None:
    """Raises `ValueError` for a model that no process can run before an engine has prepared it."""
    if is_partitioned(model):
        raise ValueError(
            "ZeRO-3 has partitioned the model while it was loaded, and such a model cannot answer before training: "
            f"{remedy}, in a script of one process."
        )


def kept_or_sampled(
    file_name: str, record: Mapping[str, Any], model: Any, args: UnlearningConfig, sampled: Callable[[bool], Any]
) -> Any:
    """
    What `output_dir` has for this model and record, else what `sampled` answers, which is then kept there.

    All processes get the same. The file's stem is the key of what was sampled. A training that has begun cannot take
    others: then another record raises `ValueError`.

    Args:
        record: digests of the sets by their roles, and `settings`.
        sampled: samples, with the model on the device of the training. Its argument says whether this process does it
            alone; else all processes call it.
    """
    folder = str(args.output_dir)
    path, first = Path(folder, file_name), args.process_index == 0
    saving.agreed(lambda: saving.check_writable(folder), args.should_save)
    of_model = json.dumps(model_record(model), sort_keys=True)
    kept = saving.agreed(lambda: _read(path, record, of_model), first)
    if kept is not None:
        return kept
    # with `cpu_ram_efficient_loading` the others have no weights
    alone = engine_requested(args, "fsdp") and args.world_size > 1

    def on_device() -> Any:
        with _on(model, args.device):
            return sampled(alone)

    found = saving.agreed(on_device, first) if alone else on_device()
    saving.agreed(lambda: _write(path, {**record, "model": of_model, path.stem: found}), first)
    return found


@contextmanager
def _on(model: Any, device: torch.device) -> Iterator[None]:
    """Inside, the model is on the device of the training. Engines that shard it want it where it was."""
    before = model.device
    moves = before != device and getattr(model, "hf_device_map", None) is None
    if moves and not getattr(model, "is_quantized", False):
        model.to(device)
    try:
        yield
    finally:
        if model.device != before:
            model.to(before)


def _read(path: Path, record: Mapping[str, Any], of_model: str) -> Any:
    """What the folder has for these sets and settings. A training that has begun cannot take others."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in record if saved.get(name) != record[name]]
    try:
        last_complete_checkpoint(str(path.parent))
    except ValueError:  # there is none
        return None if other or saved["model"] != of_model else saved[path.stem]
    if other:
        sets = [name for name in other if name != "settings"]
        what = f"another {sets[0]} set" if sets else f"other settings, {saved['settings']}"
        raise ValueError(
            f"{str(path)!r} was sampled for {what}: resume with the dataset, tokenizer and settings of the interrupted "
            "training, or pass another `output_dir`."
        )
    return saved[path.stem]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    lock = OutputLock()  # another training in this folder may be about to read the file
    lock.acquire(str(path.parent))
    try:
        atomic_write(path, lambda file: file.write_text(json.dumps(content, indent=1), encoding="utf-8"))
    finally:
        lock.release(remove=not lock.broke_off)
