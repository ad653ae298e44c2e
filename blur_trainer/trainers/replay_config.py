"""The arguments that protect what neither set mentions: replay, and weights of the retain sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blur_trainer.checks import check_fields

RETAIN_PROMPTS = "retain"


@dataclass(frozen=True)
class ReplaySettings:
    """How texts are sampled, and which of them are kept: the arguments of [`replay`]."""

    prompts: Any = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    ngram: int | None = 5
    loss_quantile: float | None = 0.95

    def __post_init__(self) -> None:
        ranges = {"max_new_tokens": "[1, inf)", "temperature": "(0, inf)", "top_p": "(0, 1]", "ngram": "[1, inf)"}
        check_fields(self, ranges | {"loss_quantile": "(0, 1]"}, owner="replay")
        if self.prompts is None or self.prompts == RETAIN_PROMPTS:
            return
        texts = isinstance(self.prompts, Sequence) and all(isinstance(text, str) and text for text in self.prompts)
        if isinstance(self.prompts, str) or not texts or not self.prompts:
            raise ValueError(
                f"replay: `prompts` must be a list of texts such as ['Question:'], or 'retain' (the beginnings of the "
                f"retain rows), got {self.prompts!r}. Default: the start of a text."
            )
