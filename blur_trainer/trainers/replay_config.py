"""The arguments that protect what neither set mentions: replay, and weights of the retain sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from blur_trainer.checks import check_fields, check_value

RETAIN_PROMPTS = "retain"


@dataclass
class ReplayConfig:
    """
    What is retained beside the given rows.

    Args:
        replay: sample so many texts from the model before unlearning and add those that do not repeat the forget set
            to the retain set, by the name `replay`, see [`replay`]. They are kept in `output_dir`, where a resumed
            training reads them.
        replay_kwargs: how: `prompts`, `max_new_tokens`, `temperature`, `top_p`, `ngram`, `loss_quantile` and
            `scrambled` of [`replay`], as a dict or JSON.
        retain_set_weights: weights of the retain sets, as a dict or JSON such as `{"replay": 0.5}`; others have 1. The
            names are those of `retain_dataset`, if it is a mapping of sets, else `retain`, and `replay`. The retain
            loss is the weighted mean of all items.
    """

    replay: int | None = field(
        default=None, metadata={"help": "Sample so many texts from the model before unlearning, to be retained too."}
    )
    replay_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'How, as JSON, e.g. \'{"prompts": ["Question:"]}\'.'}
    )
    retain_set_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weights of the retain sets as JSON, e.g. '{\"replay\": 0.5}'."}
    )

    def build_replay(self) -> "ReplaySettings":
        """Raises `ValueError` or `TypeError` for arguments that replay does not take."""
        given: Any = self.replay_kwargs or {}
        if given and self.replay is None:
            raise ValueError("`replay_kwargs` is set, but nothing is replayed: set `replay` to a number of texts.")
        accepted = [each.name for each in fields(ReplaySettings)]
        if unknown := sorted(set(given) - set(accepted)):
            raise ValueError(f"`replay_kwargs` takes no argument {unknown}; accepted: {accepted}.")
        return ReplaySettings(**given)


def check_weights(weights: Any) -> None:
    """Raises `TypeError` or `ValueError` for weights that are no positive numbers."""
    for name, weight in (weights or {}).items():
        check_value(f"retain_set_weights[{name!r}]", weight, (float,), "(0, inf)")


@dataclass(frozen=True)
class ReplaySettings:
    """How texts are sampled, and which of them are kept: the arguments of [`replay`]."""

    prompts: Any = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    ngram: int | None = 5
    loss_quantile: float | None = 0.95
    scrambled: float = 0.0

    def __post_init__(self) -> None:
        ranges = {"max_new_tokens": "[1, inf)", "temperature": "(0, inf)", "top_p": "(0, 1]", "ngram": "[1, inf)"}
        check_fields(self, ranges | {"loss_quantile": "(0, 1]", "scrambled": "[0, 1]"}, owner="replay")
        if self.prompts is None or self.prompts == RETAIN_PROMPTS:
            return
        if isinstance(self.prompts, tuple):  # the file of the texts has lists
            object.__setattr__(self, "prompts", list(self.prompts))
        listed = isinstance(self.prompts, Sequence) and not isinstance(self.prompts, str)
        if not listed or not self.prompts or not all(isinstance(text, str) and text for text in self.prompts):
            raise ValueError(
                "replay: `prompts` must be a list of texts such as ['Question:'], or 'retain' (the beginnings of the "
                f"retain rows), got {self.prompts!r}. Default: the start of a text."
            )


def set_weights(names: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float] | None:
    """The weight of each retain set, `None` if none was given. Raises `ValueError` for a name that is no set's."""
    if not weights:
        return None
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(
            f"`retain_set_weights` has weights of {unknown}, but the retain sets are {list(names)}: give "
            '`retain_dataset` as a mapping, such as `{"retain": rows, "general": texts}`, and their names here.'
        )
    return {name: float(weights.get(name, 1.0)) for name in names}
