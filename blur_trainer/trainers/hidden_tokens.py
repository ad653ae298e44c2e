"""Keeps access tokens, and prompts of replay, out of what trackers, logs and files get to see of training arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from blur_trainer.credentials import without_tokens

if TYPE_CHECKING:
    _Base = TrainingArguments
else:
    _Base = object


class HiddenTokens(_Base):
    """Gives `TrainingArguments` whose `to_dict` and texts hide nested tokens too, as in `model_init_kwargs`.

    `to_dict`, which trackers store, also hides the prompts of `replay_kwargs`: they may be the user's texts.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = HiddenTokens.__str__  # type: ignore[method-assign, assignment]  # `dataclass` would make one with the tokens

    def to_dict(self) -> dict[str, Any]:
        """As of Trainer, which trackers store."""
        given = without_tokens(super().to_dict())
        return {**given, "replay_kwargs": without_prompts(given["replay_kwargs"])}

    def __str__(self) -> str:
        shown = without_tokens(asdict(self))
        return f"{type(self).__name__}(\n" + "".join(f"{name}={shown[name]},\n" for name in sorted(shown)) + ")"


def without_prompts(replay_kwargs: Any) -> Any:
    """The same with the number of prompts in their place."""
    prompts = (replay_kwargs or {}).get("prompts")
    return (
        {**replay_kwargs, "prompts": f"<{len(prompts)} PROMPTS>"}
        if isinstance(prompts, list | tuple)
        else replay_kwargs
    )


@contextmanager
def tokens_put_aside(args: Any) -> Iterator[None]:
    """Inside, the arguments hold no tokens. For Trainer's `training_args.bin`, which is meant to be given away."""
    before = args.hub_token, args.model_init_kwargs
    args.hub_token, args.model_init_kwargs = None, without_tokens(args.model_init_kwargs)
    try:
        yield
    finally:
        args.hub_token, args.model_init_kwargs = before
