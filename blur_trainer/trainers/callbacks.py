"""Callbacks: set the pairing's epoch, stop cleanly on interrupt, show progress, write the report at the end."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from blur_trainer.atomic_write import atomic_write

logger = logging.getLogger(__name__)


class InterruptCallback(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    The processes share the signal after each step, so all stop after the same one. `interrupted` and `number` tell
    afterwards.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def interrupted(self) -> bool:
        return self.number > 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._previous:  # another attempt with a smaller batch (`auto_find_batch_size`): remember what came
            return
        self.number = 0
        if threading.current_thread() is threading.main_thread():  # Python delivers signals only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        logger.warning("%s: finishing this step, then saving a checkpoint.", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        process = PartialState()
        if process.num_processes > 1:
            self.number = int(gather(torch.tensor([self.number], device=process.device)).max())
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Restores the signal handlers. The trainer also calls it after an exception, which triggers no event."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._remember:  # `enable_jit_checkpoint` has restored its own by then
                signal.signal(number, handler)
        self._previous.clear()


class PairingCallback(TrainerCallback):
    """Sets the epoch of the paired dataset. accelerate does not do it if it wraps the batch sampler."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


class ProgressBarCallback(ProgressCallback):
    """A named progress bar with both losses, instead of a printed dictionary per log.

    ```python
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBarCallback("BLUR-NPO"))
    ```
    """

    def __init__(self, desc: str):
        super().__init__()
        self.desc = desc

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = 0
        if state.is_world_process_zero:  # with its name from the start: the base's first line has none
            self.training_bar = tqdm(desc=self.desc, total=state.max_steps, dynamic_ncols=True)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            desc, total = f"{self.desc}, evaluation", len(eval_dataloader)
            self.prediction_bar = tqdm(desc=desc, total=total, leave=self.training_bar is None, dynamic_ncols=True)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        shown = {key: f"{logs[key]:.3g}" for key in ("loss/forget", "loss/retain") if key in (logs or {})}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class ReportCallback(TrainerCallback):
    """Writes `trainer_state.json`, the figures and `report.html` into `output_dir` when training ends."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from blur_trainer.report.html import write_report  # matplotlib is slow to import

        if state.is_world_process_zero:
            atomic_write(Path(str(args.output_dir), "trainer_state.json"), lambda file: state.save_to_json(str(file)))
            write_report(str(args.output_dir))
