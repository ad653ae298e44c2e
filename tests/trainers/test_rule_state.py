"""A rule that remembers, inside a training: what it is told, where it begins, what checkpoints hold."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from support.models import examples, tiny_llama
from support.runs import settings, training_logs
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from blur_trainer.gradients.rules import BLUR
from blur_trainer.gradients.stateful_rules import GRU, PDU, Constrained
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.rule_state import RuleStateCallback

FORGET, RETAIN = examples(7), examples(5, 1)


@dataclass
class Listening:
    """A rule of a user's own, which writes down what it is told."""

    heard: list[tuple[list[float], float]] = field(default_factory=list)

    def __call__(self, gramian: Tensor) -> Tensor:
        return torch.ones(2, dtype=gramian.dtype)

    def update(self, losses: Tensor, epoch: float) -> None:
        self.heard.append((losses.tolist(), epoch))


def start(folder, rule, **config) -> BLURTrainer:
    objects = {"forget_objective": config.pop("forget_objective", None)}
    return BLURTrainer(tiny_llama(), settings(folder, **config), FORGET, RETAIN, rule=rule, **objects)


def test_a_rule_is_told_both_losses_and_the_finished_epochs(tmp_path):
    rule = Listening()
    trainer = start(tmp_path, rule)
    trainer.train()
    logs = training_logs(trainer)
    assert [losses for losses, _ in rule.heard] == [
        pytest.approx([entry["loss/forget"], entry["loss/retain"]], rel=1e-6) for entry in logs
    ]
    assert [epoch for _, epoch in rule.heard] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


@dataclass(frozen=True)
class NaNInStepTwo(GradAscent):
    calls: list[int] = field(default_factory=list)

    def __call__(self, *args, **kwargs) -> Tensor:
        loss = super().__call__(*args, **kwargs)
        self.calls.append(1)
        return loss * torch.nan if len(self.calls) == 2 else loss


def test_a_skipped_step_is_not_told_and_does_not_enter_the_mean(tmp_path):
    rule = Listening()
    start(tmp_path / "a", rule, forget_objective=NaNInStepTwo(), max_steps=3).train()
    assert [epoch for _, epoch in rule.heard] == [0.0, 0.5]
    trainer = start(tmp_path / "b", GRU(), forget_objective=NaNInStepTwo(), max_steps=3)
    trainer.train()
    assert all(torch.isfinite(mean).all() for mean in trainer._rule_state.mean.gradients)


def test_a_second_training_begins_with_the_first_state(tmp_path):
    rule = Constrained(BLUR(), epsilon=0.1)
    trainer = start(tmp_path, rule, max_steps=2)
    trainer.train()
    first = rule.multiplier
    assert first != 1.0
    again = start(tmp_path / "again", rule, max_steps=2)
    again.train()
    assert rule.multiplier == first
    assert training_logs(again)[0]["rule/multiplier"] == 1.0


def test_checkpoints_hold_the_state_and_the_mean(tmp_path):
    trainer = start(tmp_path / "a", GRU(), save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    held = load_file(tmp_path / "a" / "checkpoint-2" / "retain_mean-00000-of-00001.safetensors")
    for index, mean in enumerate(trainer._rule_state.mean.gradients):
        assert torch.equal(held[str(index)], mean)
    rule = Constrained(BLUR(), epsilon=0.1)
    start(tmp_path / "b", rule, save_strategy="steps", save_steps=1, max_steps=2).train()
    assert load_file(tmp_path / "b" / "checkpoint-2" / "rule_state.safetensors")["0.multiplier"] == rule.multiplier


@pytest.mark.parametrize(
    ("rule", "name"), [(Constrained(), "rule_state.safetensors"), (GRU(), "retain_mean-00000-of-00001.safetensors")]
)
def test_a_checkpoint_without_the_state_is_refused(tmp_path, rule, name):
    trainer = start(tmp_path, rule, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=name):
        start(tmp_path / "on", rule, max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_from_before_the_first_step_that_was_made(tmp_path):
    class NaNInStepOne(NaNInStepTwo):
        def __call__(self, *args, **kwargs) -> Tensor:
            self.calls.append(1)
            return GradAscent.__call__(self, *args, **kwargs) * (torch.nan if len(self.calls) == 1 else 1.0)

    config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    start(tmp_path, GRU(), forget_objective=NaNInStepOne(), **config).train()
    state = RuleStateCallback(lambda: [GRU()])
    state.resumed_from = str(tmp_path / "checkpoint-1")
    state.on_train_begin(None, TrainerState(), None)
    assert state.mean.gradients is None
    state.resumed_from = str(tmp_path / "checkpoint-2")
    state.on_train_begin(None, TrainerState(), None)
    assert len(state.mean.gradients) > 0


class Unfreezing(TrainerCallback):
    """After the first step another layer is trained."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].requires_grad_(False)
        model.model.layers[1].requires_grad_(True)


def test_the_mean_does_not_move_to_other_parameters(tmp_path, caplog):
    trainer = start(tmp_path, GRU(), max_steps=2)
    trainer.create_optimizer()  # holds both layers
    trainer.model.model.layers[1].requires_grad_(False)
    trainer.add_callback(Unfreezing())
    trainer.train()
    assert "Parameters were frozen or unfrozen: the mean of the retain gradient begins anew." in caplog.text


def test_a_warm_up_to_the_end_is_said(tmp_path, caplog):
    start(tmp_path, PDU(warmup_epochs=2.0), max_steps=1).train()
    assert "lasts to the end: its multiplier does not move" in caplog.text


def test_half_a_state_is_refused(tmp_path):
    class Half(Listening):
        def reset(self):
            self.heard.clear()

    with pytest.raises(TypeError, match=r"has `reset`, but no \['state_dict', 'load_state_dict'\]"):
        start(tmp_path, Half())


def test_a_state_that_cannot_be_kept_is_said(tmp_path, caplog):
    class Elsewhere(torch.nn.Module):  # as TorchJD's NashMTL
        def forward(self, gramian):
            return torch.ones(2, dtype=gramian.dtype)

        def reset(self):
            pass

    start(tmp_path, Elsewhere(), save_strategy="steps", save_steps=1, max_steps=2).train()
    start(tmp_path / "on", Elsewhere(), max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "The state of the rule Elsewhere() is in no checkpoint: it begins anew." in caplog.text


def test_fp16_is_refused_where_gradients_are_kept():
    from blur_trainer.trainers.rule_state import check_rule_state

    check_rule_state(BLUR(), fp16=True)
    check_rule_state(Constrained(), fp16=True)
    with pytest.raises(ValueError, match="with `fp16=True` their scale changes"):
        check_rule_state(GRU(), fp16=True)
