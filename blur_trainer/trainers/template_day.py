"""Chat templates that write today's date: one day for a whole training, also when it is resumed later."""

import json
import logging
from datetime import date
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from blur_trainer.data.chat import writes_the_day
from blur_trainer.saving import output_dir as saving
from blur_trainer.saving.checkpoints import last_complete_checkpoint
from blur_trainer.trainers.config import UnlearningConfig

logger = logging.getLogger(__name__)


class TemplateDayCallback(TrainerCallback, ExportableState):
    """Records the day in the checkpoints' `trainer_state.json`. Refuses to resume a training of another day."""

    def __init__(self, day: str):
        self.day = day

    def state(self) -> dict[str, Any]:
        return {"args": {"day": self.day}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        recorded = _day_in(state.stateful_callbacks)
        if recorded not in (None, self.day):
            raise ValueError(
                f"The checkpoint was trained with {recorded} as the chat template's date, this training has {self.day}:"
                f" set `chat_template_date={recorded!r}`, or the tokens are not those of the checkpoint."
            )
        if isinstance(state.stateful_callbacks, dict):  # Trainer saves only what the resumed checkpoint had
            state.stateful_callbacks[type(self).__name__] = self.state()


def settle_day(args: UnlearningConfig, tokenizer: Any) -> None:
    """Sets `args.chat_template_date` where the template writes a date: to that of the newest checkpoint, or today."""
    if not writes_the_day(tokenizer):
        return
    if args.chat_template_date is None:
        found: list[str | None] = [_recorded(str(args.output_dir)) or date.today().isoformat()]
        args.chat_template_date = broadcast_object_list(found)[0]  # midnight may come between two processes
    if args.should_log:
        logger.warning(
            "The chat template writes today's date. Here it is %s in every prompt, also when this training is resumed "
            "(`chat_template_date`). A model that is asked on another day gets another prompt.",
            args.chat_template_date,
        )


def day_callbacks(args: UnlearningConfig, tokenizer: Any) -> list[TrainerCallback]:
    """What records the day, where the template writes one."""
    return [TemplateDayCallback(str(args.chat_template_date))] if writes_the_day(tokenizer) else []


def _recorded(output_dir: str) -> str | None:
    try:
        checkpoint = last_complete_checkpoint(output_dir)
    except ValueError:  # there is none
        return None
    state = json.loads(Path(checkpoint, saving.STATE_NAME).read_text(encoding="utf-8"))
    return _day_in(state.get("stateful_callbacks"))


def _day_in(callbacks: Any) -> str | None:
    return (callbacks or {}).get(TemplateDayCallback.__name__, {}).get("args", {}).get("day")
