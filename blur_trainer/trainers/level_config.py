"""Settings of forgetting to a level: where it ends, and what it may cost."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from blur_trainer.checks import check_value

if TYPE_CHECKING:
    _Base = TrainingArguments
else:
    _Base = object


@dataclass
class LevelConfig(_Base):
    """
    Args:
        forget_level: how well the model may know an answer that it is to forget, in nats per token: of `target_loss`
            its level; any other forget objective pushes an answer until it has this loss ([`Until`]). `"column"`:
            each row has its own, in the forget set's column `forget_level`. `None`: no level, but `target_loss` reads
            the column.
        level_two_sided: also bring back an answer whose loss has gone beyond its level: of `target_loss`, and of `rmu`
            from 1.25 times the level on, which then draws the activations to the frozen model's.
        stop_at_level: end the training as soon as an evaluation finds the forget set at its level (the mean loss of a
            sample of 128 rows) and the retain loss at most `retain_bound` above what it was (by default 0.1). Needs
            `eval_strategy`.
        retain_bound: how far the retain loss may rise above what it was before training, in nats per token. Beyond it,
            each evaluation halves the strength of forgetting, three times at most; then training ends. With
            `load_best_model_at_end` the best checkpoint so far is restored (`metric_for_best_model="level"`). Needs
            `eval_strategy`.
    """

    forget_level: float | str | None = field(
        default=None,
        metadata={"help": "Nats per token at which an answer is forgotten, or 'column'. Default: no level."},
    )

    level_two_sided: bool = field(
        default=False, metadata={"help": "Also bring back answers beyond the level (rmu, target_loss)."}
    )
    stop_at_level: bool = field(
        default=False, metadata={"help": "End the training when an evaluation finds the forget set at its level."}
    )
    retain_bound: float | None = field(
        default=None, metadata={"help": "Nats per token that retaining may pay. Beyond: forget less, then stop."}
    )

    def settle_level(self) -> None:
        """A level from a command line is a text. Raises `TypeError` or `ValueError` for one that cannot be."""
        if isinstance(self.forget_level, str) and self.forget_level != "column":
            try:
                self.forget_level = float(self.forget_level)
            except ValueError:
                raise ValueError(
                    f"`forget_level` must be a number above 0 (nats per token) or 'column', got {self.forget_level!r}."
                ) from None
        if self.forget_level != "column":
            check_value("forget_level", self.forget_level, (float, type(None)), "(0, inf)")
        guarded = self.stop_at_level or self.retain_bound is not None
        if guarded and self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "level"

    def check_schedule(self) -> None:
        """Raises `ValueError` where nothing would look at the level."""
        for name in ("stop_at_level", "retain_bound"):
            if getattr(self, name) not in (False, None) and self.eval_strategy == "no":
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is looked at with every evaluation, and there is none: set "
                    "`eval_strategy='epoch'`, or 'steps' with `eval_steps`."
                )
