"""Gives the user's model back as trainable as it was: after a construction that failed, and after each training."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from blur_trainer.objectives.base import Objective
from blur_trainer.trainers.adapters import remove_adapter
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.trainable import choose_trainable


def restoring(construct: Callable[..., None]) -> Callable[..., None]:
    """For a trainer's `__init__`: if it raises, the model has its `requires_grad` flags back, and no new adapter.

    So it can be called again with the same model.
    """

    @functools.wraps(construct)
    def constructed(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        flags = [(p, p.requires_grad) for p in model.parameters()] if isinstance(model, nn.Module) else []
        done = False
        try:
            construct(self, model, *args, **kwargs)
            done = True
        finally:
            if not done:
                _restore(flags, getattr(self, "adapted", None))

    return constructed


def _restore(flags: list[tuple[nn.Parameter, bool]], adapted: PeftModel | None) -> None:
    if flags and adapted is not None:
        remove_adapter(adapted)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


class Freezing:
    """The choice of `choose_trainable`. What it freezes is frozen while the model trains, and not afterwards.

    What PEFT freezes below a new adapter stays frozen, as PEFT's users expect.
    """

    def __init__(self, model: nn.Module, args: UnlearningConfig, objectives: Mapping[str, Objective]):
        before = [name for name, p in model.named_parameters() if p.requires_grad]
        self.chosen = choose_trainable(model, args.train_layers, args.train_parameters, objectives)
        self._names = [name for name in before if not model.get_parameter(name).requires_grad]

    def freeze(self, model: nn.Module) -> None:
        for name in self._names:
            model.get_parameter(name).requires_grad_(False)

    def release(self, model: nn.Module) -> None:
        for name in self._names:
            model.get_parameter(name).requires_grad_(True)
