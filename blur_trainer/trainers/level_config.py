"""Settings of forgetting to a level: where it ends, and what it may cost."""

from dataclasses import dataclass, field

from blur_trainer.checks import check_value


@dataclass
class LevelConfig:
    """
    Args:
        forget_level: how well the model may know an answer that it is to forget, in nats per token: of `target_loss`
            its level; any other forget objective pushes an answer until it has this loss ([`Until`]). `"column"`:
            each row has its own, in the forget set's column `forget_level`. `None`: no level, but `target_loss` reads
            the column.
    """

    forget_level: float | str | None = field(
        default=None,
        metadata={"help": "Nats per token at which an answer is forgotten, or 'column'. Default: no level."},
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
