"""Checkpoints with a manifest: a checkpoint counts only when all of it is on disk.

`checkpoint-N/blur_checkpoint.json` is `{"files": null}` while the folder is written. When all processes have finished
and the data is on disk, it lists every file with its size. Only then older checkpoints are deleted. A folder without
that file comes from a plain `Trainer` or an earlier blur_trainer. It counts if its `trainer_state.json` can be read.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from blur_trainer.atomic_write import atomic_write, flush_tree
from blur_trainer.saving import output_dir as saving

logger = logging.getLogger(__name__)
MANIFEST_NAME = "blur_checkpoint.json"
_BEGUN = ".training"  # a file in output_dir during training; if it is there at the start, a training was killed
_PREVIOUS, _REMOVED = ".previous-", ".removed-"  # prefixes of folders being replaced or deleted


def _checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Step -> checkpoint folder, complete or not, oldest first."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if named and path.is_dir():
            found[int(named[1])] = path
    return dict(sorted(found.items()))


def _read(path: Path) -> tuple[int, dict[str, int] | None] | None:
    """The step of a complete checkpoint, and its files if it has a manifest. None if writing was interrupted."""
    try:
        step = int(json.loads((path / saving.STATE_NAME).read_text())["global_step"])
        if not (path / MANIFEST_NAME).exists():
            return step, None
        files = json.loads((path / MANIFEST_NAME).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, truncated, or malformed
        return None
    return (step, files) if isinstance(files, dict) else None


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest complete checkpoint."""
    complete = [path for path in _checkpoints(output_dir).values() if _read(path)]
    if not complete:
        raise ValueError(f"No complete checkpoint in output_dir {output_dir!r} to resume from.")
    return str(complete[-1])


def _resumable_step(path: Path) -> int:
    """The step to continue from. Raises if the folder does not hold the whole training state."""
    read = _read(path)
    if read is None:
        raise ValueError(
            f"{str(path)!r} is not a complete checkpoint: it is not there, or its writing was interrupted. Pass "
            "`resume_from_checkpoint=True` for the newest complete one in output_dir."
        )
    step, files = read
    damaged = [n for n, size in (files or {}).items() if not (path / n).is_file() or (path / n).stat().st_size != size]
    if damaged:
        raise ValueError(
            f"{str(path)!r} has been changed since it was saved: {damaged[0]!r} is missing or has another size. Put it "
            "back, or move the folder away and resume from an older checkpoint."
        )
    if not any(path.glob("rng_state*.pth")):  # every engine writes them, except under save_only_model
        raise ValueError(
            f"{str(path)!r} holds a model but no optimizer state (`save_only_model=True`): training cannot be resumed "
            "from it. Pass it as `model` with a new output_dir to start a new training from its weights."
        )
    return step


def resume_point(output_dir: str, given: str | bool | None, fresh: bool) -> str | None:
    """Where training starts. Raises if training would overwrite anything. Called on the writing process.

    Leftovers of an interrupted save are deleted if they are newer than the checkpoint to resume from. `fresh`: the
    trainer has not trained yet, so files in the folder belong to another run.
    """
    if not given:
        if fresh or _checkpoints(output_dir):
            saving.check_output_dir(output_dir)
        saving.check_writable(output_dir)
        (Path(output_dir) / _BEGUN).touch()
        return None
    saving.check_writable(output_dir)
    _recover(Path(output_dir))
    path: Path | None = Path(str(given))
    if str(given).lower() == "true":  # from a command line it is a string
        killed_early = (Path(output_dir) / _BEGUN).exists() and not any(map(_read, _checkpoints(output_dir).values()))
        path = None if killed_early else Path(last_complete_checkpoint(output_dir))
    step = 0 if path is None else _resumable_step(path)
    newer = {number: folder for number, folder in _checkpoints(output_dir).items() if number > step}
    complete = [folder.name for folder in newer.values() if _read(folder)]
    if complete:
        raise ValueError(
            f"Resuming from step {step} would overwrite newer checkpoints in output_dir {output_dir!r} "
            f"({', '.join(complete)}). Pass another `output_dir`, or move them away, or pass "
            "`resume_from_checkpoint=True` to continue from the newest."
        )
    for folder in newer.values():
        _remove(folder)
    if path is None:
        logger.warning("Killed before its first checkpoint: the training in %s starts from the beginning.", output_dir)
        return None
    return str(path)


def _remove(path: Path) -> None:
    """Deletes a folder. It is renamed first, so that a kill leaves no partial folder that looks like a checkpoint."""
    doomed = path.with_name(_REMOVED + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _recover(output_dir: Path) -> None:
    """Finishes interrupted deletions and interrupted replacements of a checkpoint by one of the same step."""
    for path in output_dir.glob(f"{_REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for previous in output_dir.glob(f"{_PREVIOUS}*"):
        path = output_dir / previous.name.removeprefix(_PREVIOUS)
        if _read(path):
            shutil.rmtree(previous, ignore_errors=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
            os.rename(previous, path)


def _begin(path: Path, needed: int) -> None:
    """Makes an empty folder with an open manifest. Keeps a complete checkpoint of that step meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saving.check_space(path.parent, needed)
    if path.exists():
        if _read(path):
            shutil.rmtree(path.with_name(_PREVIOUS + path.name), ignore_errors=True)
            os.rename(path, path.with_name(_PREVIOUS + path.name))
        else:
            _remove(path)
    try:
        path.mkdir()
        _write_manifest(path, None)
    except OSError as error:
        raise saving.failed(path, error) from error


def _write_manifest(path: Path, files: dict[str, int] | None) -> None:
    atomic_write(path / MANIFEST_NAME, lambda file: file.write_text(json.dumps({"files": files}, indent=1)))


def _finish(path: Path) -> int:
    """Closes the manifest when everything in the folder is on disk. Returns the bytes in the folder."""
    files = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
    del files[MANIFEST_NAME]
    flush_tree(path)
    _write_manifest(path, files)
    shutil.rmtree(path.with_name(_PREVIOUS + path.name), ignore_errors=True)
    return sum(files.values())


def _rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """As `transformers.trainer_utils.rotate_checkpoints`, but no folder is half-deleted under its own name."""
    if limit is None or limit <= 0:
        return
    paths = sort_checkpoints(str(run_dir), best_model_checkpoint=best)  # the best one is second to last
    protected = {paths[-1], str(Path(best or paths[-1]))} & set(paths)
    for path in paths[: -max(limit, len(protected))]:
        _remove(Path(path))


class CheckpointCallback(TrainerCallback):
    """Opens and closes the manifest of each checkpoint, and deletes old checkpoints only after that.

    Trainer would delete before the other ranks have finished writing. So this class holds its `save_total_limit`.
    """

    def __init__(self) -> None:
        self._writing: Path | None = None
        self._limit: int | None = None
        self._args: TrainingArguments | None = None
        self._size = 0  # bytes of the last checkpoint
        self._parts: tuple[nn.Module | None, Any] = (None, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._args, self._limit, args.save_total_limit = args, args.save_total_limit, None
        self._size, self._parts = 0, (kwargs["model"], kwargs["optimizer"])
        if state.global_step >= state.max_steps:  # a finished training is continued
            control.should_training_stop = True
        if args.save_strategy != "no":
            folder, needed = Path(str(args.output_dir)), saving.saved_bytes(*self._parts)
            saving.agreed(lambda: saving.check_space(folder, needed), args.should_save)

    def begin(self, path: Path, writes: bool) -> None:
        """Called before Trainer writes into `path`. Checks free space and removes old files."""
        needed = self._size or saving.saved_bytes(*self._parts)
        saving.agreed(lambda: _begin(path, needed), writes)
        self._writing = path

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if self._writing is not None and args.should_save:
            self._size = _finish(self._writing)
            _rotate(self._writing.parent, self._limit, state.best_model_checkpoint)
        self._writing = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint
        if args.should_save:
            (Path(str(args.output_dir)) / _BEGUN).unlink(missing_ok=True)
        if args.should_save and self._limit == 1 and best is not None:  # as in Trainer, only the best one stays
            for path in _checkpoints(Path(best).parent).values():
                if not os.path.samefile(path, best):
                    _remove(path)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Context of a training. Explains what to do after a failed save, and restores `save_total_limit`."""
        try:
            yield
        except saving.WRITE_ERRORS as error:
            if self._writing is None:
                raise
            raise saving.failed(self._writing, error) from error
        finally:
            if self._args is not None:
                self._args.save_total_limit = self._limit
            self._args, self._writing, self._parts = None, None, (None, None)
