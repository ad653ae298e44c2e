"""Checkpoints with a manifest: a checkpoint counts only when all of it is on disk.

Its manifest (`saving.manifest`) is open while the folder is written. When all processes have finished and the data is
on disk, it is closed: it lists every file with its checksum, and what the training is made of. Only then older
checkpoints are deleted. A folder without a manifest comes from a plain `Trainer`. It counts if its
`trainer_state.json` can be read.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from blur_trainer.atomic_write import remove_tree
from blur_trainer.saving import output_dir as saving
from blur_trainer.saving.manifest import check_files, close_manifest, open_manifest, read_manifest
from blur_trainer.saving.run_record import check_run

logger = logging.getLogger(__name__)
_PREVIOUS, _REMOVED = ".previous-", ".removed-"  # prefixes of folders being replaced or deleted
Record = Mapping[str, Any]


def _checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Step -> checkpoint folder, complete or not, oldest first."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if named and path.is_dir():
            found[int(named[1])] = path
    return dict(sorted(found.items()))


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest complete checkpoint."""
    complete = [path for path in _checkpoints(output_dir).values() if read_manifest(path)]
    if not complete:
        raise ValueError(f"No complete checkpoint in output_dir {output_dir!r} to resume from.")
    return str(complete[-1])


def _resumable_step(path: Path, record: Record) -> int:
    """The step to continue from. Raises if the folder does not hold the whole state of this very training."""
    manifest = read_manifest(path)
    if manifest is None:
        raise ValueError(
            f"{str(path)!r} is not a complete checkpoint: it is not there, or its writing was interrupted. Pass "
            "`resume_from_checkpoint=True` for the newest complete one in output_dir."
        )
    if not any(path.glob("rng_state*.pth")) and "rng_state" not in "".join(manifest.files or ()):
        raise ValueError(  # every engine writes random states, except under save_only_model
            f"{str(path)!r} holds a model but no optimizer state (`save_only_model=True`): training cannot be resumed "
            "from it. Pass it as `model` with a new output_dir to start a new training from its weights."
        )
    check_run(path, manifest.run, record)
    check_files(path, manifest.files or {})
    return manifest.step


def resume_point(output_dir: str, given: str | bool | None, fresh: bool, broke_off: bool, record: Record) -> str | None:
    """Where training starts. Raises if training would overwrite anything. Called on the writing process.

    Leftovers of an interrupted save are deleted if they are newer than the checkpoint to resume from.

    Args:
        output_dir, given: of the trainer, and its `resume_from_checkpoint`.
        fresh: the trainer has not trained yet, so files in the folder belong to another run.
        broke_off: an earlier training in the folder did not end.
        record: what this training is made of, see `saving.run_record`.
    """
    if not given:
        if fresh or _checkpoints(output_dir):
            saving.check_output_dir(output_dir)
        return None
    _recover(Path(output_dir))
    path: Path | None = Path(str(given))
    if str(given).lower() == "true":  # from a command line it is a string
        killed_early = broke_off and not any(map(read_manifest, _checkpoints(output_dir).values()))
        path = None if killed_early else Path(last_complete_checkpoint(output_dir))
    step = 0 if path is None else _resumable_step(path, record)
    newer = {number: folder for number, folder in _checkpoints(output_dir).items() if number > step}
    complete = [folder.name for folder in newer.values() if read_manifest(folder)]
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
    remove_tree(doomed)
    os.rename(path, doomed)
    remove_tree(doomed)


def _recover(output_dir: Path) -> None:
    """Finishes interrupted deletions and interrupted replacements of a checkpoint by one of the same step."""
    for path in output_dir.glob(f"{_REMOVED}*"):
        remove_tree(path)
    for previous in output_dir.glob(f"{_PREVIOUS}*"):
        path = output_dir / previous.name.removeprefix(_PREVIOUS)
        if read_manifest(path):
            remove_tree(previous)
        else:
            remove_tree(path)
            os.rename(previous, path)


def _begin(path: Path, needed: int) -> None:
    """Makes an empty folder with an open manifest. Keeps a complete checkpoint of that step meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saving.check_space(path.parent, needed)
    if path.exists():
        if read_manifest(path):
            remove_tree(path.with_name(_PREVIOUS + path.name))
            os.rename(path, path.with_name(_PREVIOUS + path.name))
        else:
            _remove(path)
    try:
        path.mkdir()
        open_manifest(path)
    except OSError as error:
        raise saving.failed(path, error) from error


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

    Trainer would delete before the other ranks have finished writing. So it does not see `save_total_limit` when it
    would.
    """

    def __init__(self) -> None:
        #: what the training is made of; written into each checkpoint
        self.record: Record | None = None
        self._writing: Path | None = None
        self._hidden: tuple[TrainingArguments, int | None] | None = None
        self._size = 0  # bytes of the last checkpoint
        self._parts: tuple[nn.Module | None, Any] = (None, None)

    def _hide_limit(self, args: TrainingArguments) -> None:
        self._show_limit()
        self._hidden, args.save_total_limit = (args, args.save_total_limit), None

    def _show_limit(self) -> None:
        if self._hidden is not None:
            args, limit = self._hidden
            args.save_total_limit, self._hidden = limit, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show_limit()  # `auto_find_batch_size` begins anew
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

    def model_written(self, args: TrainingArguments) -> None:
        """Called after the model, before Trainer writes the rest and would delete older checkpoints."""
        self._hide_limit(args)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._show_limit()
        PartialState().wait_for_everyone()
        if self._writing is not None and args.should_save:
            self._size = close_manifest(self._writing, self.record)
            _rotate(self._writing.parent, args.save_total_limit, state.best_model_checkpoint)
        self._writing = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "train_runtime" in (logs or {}):  # the last log, after which Trainer deletes all but the best
            self._hide_limit(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show_limit()
        best = state.best_model_checkpoint
        if args.should_save and args.save_total_limit == 1 and best is not None:  # as in Trainer, only the best stays
            for path in _checkpoints(Path(best).parent).values():
                if not os.path.samefile(path, best):
                    _remove(path)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Context of a training. Explains what to do after a failed save, and leaves `args` as they were."""
        try:
            yield
        except saving.WRITE_ERRORS as error:
            if self._writing is None:
                raise
            raise saving.failed(self._writing, error) from error
        finally:
            self._show_limit()
            self._writing, self._parts = None, (None, None)
