"""A training from the lock on its `output_dir` to its last line: what it resumes, and how it ended."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import Trainer, TrainerCallback

from blur_trainer.objectives.base import Objective
from blur_trainer.saving import output_dir as saving
from blur_trainer.saving.checkpoints import CheckpointCallback, last_complete_checkpoint, resume_point
from blur_trainer.saving.lock import OutputLock
from blur_trainer.trainers import ending
from blur_trainer.trainers.callbacks import InterruptCallback
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.health import HealthCallback
from blur_trainer.trainers.record import model_record, settings_record
from blur_trainer.trainers.step_log import StepLog

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = get_logger(__name__)


class RunningMixin(_Base):
    """Gives a `Trainer` the frame of its `train()`: [`running`]."""

    args: UnlearningConfig
    objectives: dict[str, Objective]
    rule: Any
    forget_procedure: Any
    step_log: StepLog
    trained: str
    #: how training ended, for the model card, if it did not end as it should
    interrupted_at: str | None = None
    nothing_trained = False
    _started_from: Mapping[str, Any] | None = None

    def make_frame(self, args: UnlearningConfig) -> list[TrainerCallback]:
        """The callbacks that this class needs. Makes `output_dir`, or raises on every process if that is impossible."""
        saving.agreed(lambda: saving.check_writable(str(args.output_dir)), args.should_save)
        self.interrupt, self.checkpoints, self.health = InterruptCallback(), CheckpointCallback(), HealthCallback()
        return [self.interrupt, self.checkpoints, self.health]

    @contextmanager
    def running(self, resume_from_checkpoint: str | bool | None) -> Iterator[str | None]:
        """Context of a training in the locked `output_dir`. Yields the checkpoint to continue from.

        Raises:
            ValueError: before training, if the folder is in use or the checkpoint is damaged or another training's.
            FloatingPointError: after it, if the weights are ruined.
            RuntimeError: after it, if no weight has changed.
            TrainingInterrupted: after SIGINT or SIGTERM.
        """
        given, fresh = resume_from_checkpoint, self.state.global_step == 0
        self.interrupted_at, self.nothing_trained = None, False
        lock, begun, ended = OutputLock(), False, False
        try:
            start = saving.agreed(lambda: self._start(lock, given, fresh), self.args.should_save)
            begun = True
            with self.checkpoints.guard():
                yield start
            ended = True
        finally:
            self.interrupt.restore()
            lock.release(remove=ended or not (begun or lock.broke_off))
        self._end()

    def _start(self, lock: OutputLock, given: str | bool | None, fresh: bool) -> str | None:
        """On the writing process: takes the lock, and finds out where training starts."""
        folder = str(self.args.output_dir)
        saving.check_writable(folder)
        lock.acquire(folder)
        self.checkpoints.record = record = self._record()
        return resume_point(folder, given, fresh, lock.broke_off, record)

    def _record(self) -> Mapping[str, Any]:
        """What this training is made of; the model is as it was before the first training of this trainer."""
        model: Any = self.model
        if self._started_from is None:
            self._started_from = model_record(model)
        parts: dict[str, Any] = {f"{role}_objective": objective for role, objective in self.objectives.items()}
        parts |= {"rule": self.rule, "trained parameters": self.trained}
        parts["forget_procedure"] = self.forget_procedure or "one pass"
        return settings_record(self.args, self.train_dataset, parts, self.accelerator.num_processes, self._started_from)

    def check_weights(self) -> None:
        """Raises `FloatingPointError` if training has ruined the weights: before anything is saved or deleted."""
        model: Any = self.model
        fault = self.health.fault(model)
        if fault is None:
            return
        try:
            good = f"The last good checkpoint is {last_complete_checkpoint(str(self.args.output_dir))!r}"
        except ValueError:
            good = "No checkpoint was saved before"
        raise FloatingPointError(
            f"Training has ruined the model: after step {self.state.global_step} {fault}. It is not saved. {good}. "
            "Lower `learning_rate` or the rule's weights, or choose a bounded forget objective (`npo` instead of "
            "`grad_ascent`)."
        )

    def _end(self) -> None:
        """Says how training ended, if it did not end as it should."""
        state = self.state
        model: Any = self.model
        self.check_weights()
        if self.interrupt.interrupted:
            where = f"Interrupted at step {state.global_step} of {state.max_steps}"
            self.interrupted_at = where if state.global_step < state.max_steps else None
            remedy = "Continue with `resume_from_checkpoint=True` and the same arguments."
            interruption = ending.TrainingInterrupted(where, remedy, self.interrupt.number)
            logger.warning(str(interruption))
            raise interruption
        self.nothing_trained = not self.health.finished and not self.health.moved(model)
        if self.nothing_trained:
            steps = state.global_step - self.health.first_step
            message = ending.nothing_trained(steps, self.step_log.skipped, self.args.learning_rate, model)
            if self.args.learning_rate > 0:
                raise RuntimeError(message)
            logger.warning(message)  # as asked: see `trainers.effect`
        best = state.best_global_step if self.args.load_best_model_at_end else None
        vocabulary = self.accelerator.unwrap_model(model).config.get_text_config().vocab_size
        for line in ending.last_words(state, self.objectives, vocabulary, best):
            logger.warning(line)
