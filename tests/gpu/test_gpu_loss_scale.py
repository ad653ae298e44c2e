"""fp16 with a loss scaler: a step that overflows moves nothing and lowers the scale, and training goes on.

The dry run tells accelerate of a scaler after construction, as fp16 is refused on a CPU (tests/trainers/test_skips.py).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from support.device import CARD, DEVICE, on_device
from support.models import examples, tiny_llama
from support.runs import distance, training_logs, weights
from transformers import TrainerCallback

from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.trainers.blur import BLURTrainer


@dataclass(frozen=True)
class Overflowing(Objective):
    """Its loss is infinite in the call number `at`, one per step here."""

    at: int
    calls: list = field(default_factory=list, compare=False)
    needs_reference: ClassVar[bool] = False

    def losses(self, model, batch, reference):
        losses = GradAscent().losses(model, batch, reference)
        self.calls.append(1)
        return losses * torch.inf if len(self.calls) - 1 == self.at else losses


class Ends(TrainerCallback):
    """Weights and scale after each step; index 0 is before the first."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights, self.scales = [weights(kwargs["model"])], []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(weights(kwargs["model"]))


@pytest.fixture
def run(tmp_path, monkeypatch):
    def start(scale, objective, rule, **config):
        seen = Ends()
        args = on_device(tmp_path, fp16=CARD, learning_rate=1e-2, **config)
        data = examples(10, seed=5), examples(4, seed=6)
        trainer = BLURTrainer(tiny_llama(), args, *data, forget_objective=objective, rule=rule, callbacks=[seen])
        trainer.accelerator.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        if not CARD:
            monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
            trainer.accelerator.native_amp = True
        trainer.train()
        monkeypatch.undo()
        return trainer, [distance(a, b) for a, b in zip(seen.weights, seen.weights[1:], strict=False)]

    return start


@pytest.mark.parametrize("rule", [BLUR(gamma=0.5), Sum(0.0, 1.0)], ids=["blur", "weight 0"])
def test_an_overflow_in_the_middle_is_skipped_and_training_goes_on(run, rule):
    trainer, moved = run(2.0**8, Overflowing(2), rule, num_train_epochs=1)
    assert len(moved) == 5
    assert [way == 0 for way in moved] == [False, False, True, False, False]
    assert [entry.get("grad/skipped") for entry in training_logs(trainer)] == [None, None, 1.0, None, None]
    assert trainer.accelerator.scaler.get_scale() == 2.0**7
    taken = {int(entry["step"]) for entry in trainer.optimizer.state_dict()["state"].values()}
    assert taken == {4}


def test_a_scale_that_is_too_high_is_lowered_until_it_fits(run):
    trainer, moved = run(2.0**26, GradAscent(), BLUR(gamma=0.5), num_train_epochs=5)
    skips = [entry.get("grad/skipped") == 1.0 for entry in training_logs(trainer)]
    assert skips[0] and not any(skips[-5:])
    assert [way == 0 for way in moved] == skips
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (26 - sum(skips))
