"""What rules remember: set back before each training, written into checkpoints, the same on every process."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blur_trainer.constants import ROLES
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.retain_mean import RetainMean
from blur_trainer.gradients.rules import Rule
from blur_trainer.trainers.shares import read_share, there, write_share

logger = get_logger(__name__)
#: files in a checkpoint; the mean's name goes on as `shares` says
STATE_NAME = "rule_state.safetensors"
MEAN_NAME = "retain_mean"


def check_rule_state(rule: Rule, fp16: bool) -> None:
    """Raises for half a contract, and where a kept gradient would be of another loss scale than the next one."""
    missing = [name for name in ("state_dict", "load_state_dict") if not hasattr(rule, name)]
    if hasattr(rule, "reset") and missing:
        raise TypeError(f"The rule {rule!r} has `reset`, but no {missing}: checkpoints could not hold its state.")
    if hasattr(rule, "update") and not hasattr(rule, "reset"):
        logger.warning("The rule %r has `update`, but no `reset`: what it remembers is in no checkpoint.", rule)
    if fp16 and _smoothing(rule) is not None:
        raise ValueError(
            f"The rule {rule!r} keeps gradients from step to step, and with `fp16=True` their scale changes: use "
            "`bf16=True` or float32."
        )


def inform(rule: Rule, losses: Mapping[str, Tensor], epoch: float, accelerator: Accelerator) -> None:
    """Tells a rule that asks for it the losses of the step that was made."""
    update = getattr(rule, "update", None)
    if update is not None:
        shares = torch.stack([losses[role].float() for role in ROLES if role in losses])
        # process 0's sum counts: elsewhere the last bit may differ, and the processes would drift apart
        update(broadcast(accelerator.reduce(shares, "mean")).cpu().double(), epoch)


class RuleStateCallback(TrainerCallback):
    """Sets the rules back, or to where the checkpoint's training was, before the first step.

    Args:
        rules: returns the rules of this training, one per topic.
    """

    def __init__(self, rules: Callable[[], Iterable[Rule]]):
        self.rules = rules
        self.resumed_from: str | None = None
        self.mean: RetainMean | None = None

    def _stateful(self) -> list[Any]:
        return list({id(rule): rule for rule in self.rules() if hasattr(rule, "reset")}.values())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for rule in self._stateful():
            rule.reset()
        for rule in self.rules():
            waits = getattr(rule, "warmup_epochs", 0)
            if waits and waits >= state.num_train_epochs:
                logger.warning("The warm-up of %r lasts to the end: its multiplier does not move.", rule)
        smoothing = next((s for s in map(_smoothing, self.rules()) if s is not None), None)
        self.mean = None if smoothing is None else RetainMean(smoothing)
        if self.resumed_from is not None:
            self._load(Path(self.resumed_from))

    def parameters_changed(self) -> None:
        """Other parameters are trained from now on: a mean of the old ones' gradients would be moved to them."""
        if self.mean is not None and self.mean.gradients is not None:
            logger.warning("Parameters were frozen or unfrozen: the mean of the retain gradient begins anew.")
            self.mean = RetainMean(self.mean.smoothing)

    def save(self, checkpoint: str | Path, backend: GradientBackend | None, writes: bool) -> None:
        """On every process: under sharding each one writes its share of the mean. `writes`: the others' too."""
        state = {f"{i}.{name}": t for i, rule in enumerate(self._stateful()) for name, t in rule.state_dict().items()}
        if state and writes:
            save_file(_copied(state), Path(checkpoint, STATE_NAME))
        if self.mean is None or backend is None:
            return
        gradients = self.mean.gradients or []  # none before the first step that was made
        write_share(checkpoint, MEAN_NAME, gradients, backend.sharded, writes)

    def _load(self, checkpoint: Path) -> None:
        rules = self._stateful()
        for rule in rules:
            if not rule.state_dict():  # a `Weighting` of TorchJD that keeps arrays
                logger.warning("The state of the rule %r is in no checkpoint: it begins anew.", rule)
        if any(rule.state_dict() for rule in rules):
            state = load_file(there(checkpoint / STATE_NAME))
            for i, rule in enumerate(rules):
                own = {name.split(".", 1)[1]: t for name, t in state.items() if name.startswith(f"{i}.")}
                rule.load_state_dict(own)
        if self.mean is not None:
            gradients, _ = read_share(checkpoint, MEAN_NAME)
            self.mean.restore(gradients or None)


def _smoothing(rule: Rule) -> float | None:
    return getattr(rule, "retain_smoothing", None)


def _copied(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).detach().cpu().clone().contiguous() for name, value in state.items()}
