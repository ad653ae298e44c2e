"""How a training ends: what would train nothing, ruined weights, a collapse, and what a normal run does not say."""

import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.cases import every
from support.models import examples, tiny_llama
from support.runs import distance, settings, weights
from torch import nn
from transformers import TrainerCallback, TrainerState

from blur_trainer.gradients.rules import BLUR, PCGrad, Sum
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers import ending
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.effect import check_batches, check_effect
from blur_trainer.trainers.health import GROWTH, HealthCallback

FORGET, RETAIN = examples(4), examples(3, 1)


def make(folder, rule=None, callbacks=None, forget=FORGET, model=None, optimizers=(None, None), **config):
    args = settings(folder, **({"max_steps": 1, "lr_scheduler_type": "constant"} | config))
    objectives = {"forget_objective": GradAscent()}
    return BLURTrainer(
        model or tiny_llama(), args, forget, RETAIN, rule=rule, callbacks=callbacks, optimizers=optimizers, **objectives
    )


# ---- what would train nothing ----


def test_settings_that_train_nothing_are_refused_by_name(tmp_path):
    def refused(words, rule=None, **config):
        args = settings(tmp_path / "run", **config)
        with pytest.raises(ValueError, match="Nothing would be trained") as raised:
            check_effect(args, [PCGrad(), rule or BLUR()], own_optimizer=False, retain=True)
        assert words in str(raised.value) and "\n" not in str(raised.value)

    refused("BLUR(lower_level='forget', gamma=0.0, alpha=0.0", BLUR(gamma=0.0, alpha=0.0))
    refused("Sum(forget_weight=0.0, retain_weight=0.0) gives no gradient a weight", Sum(0.0, 0.0))


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_epochs": 0},
        {"num_train_epochs": -1},
        {"max_steps": 0},
        {"gradient_accumulation_steps": -1},
    ],
    ids=str,
)
def test_settings_without_a_step_are_refused_when_they_are_made(config, tmp_path):
    with pytest.raises(ValueError, match=f"`{next(iter(config))}` must be"):
        settings(tmp_path / "run", **config)
    assert not (tmp_path / "run").exists()


def test_the_trainer_refuses_them_before_it_makes_a_folder(tmp_path):
    with pytest.raises(ValueError, match="Nothing would be trained"):
        make(tmp_path / "run", Sum(0.0, 0.0))
    with pytest.raises(ValueError, match="drops the last batch, and 4 forget examples are less than one batch of 5 on"):
        make(tmp_path / "run", dataloader_drop_last=True, per_device_train_batch_size=5)
    assert not (tmp_path / "run").exists()


def test_settings_that_train_something_are_not(tmp_path):
    def accepted(config, rule=None, own_optimizer=False, retain=True):
        args = settings(tmp_path / "run", **config)
        check_effect(args, [rule or BLUR()], own_optimizer, retain)
        check_batches(args, BLURTrainer)  # no dataset: of unknown length

    cases = {
        "steps instead of epochs": ({"num_train_epochs": 0, "max_steps": 1},),
        "a part of an epoch": ({"num_train_epochs": 0.1},),
        "own optimizer": ({"learning_rate": 0.0}, None, True),
        "only a look": ({"learning_rate": 0.0},),
        "one weight": ({}, Sum(0.0, 1.0)),
        "the other": ({}, BLUR(gamma=0.0)),
        "a rule of one's own": ({}, lambda gramian: torch.zeros(2)),
    }
    every(cases, accepted)
    with pytest.raises(ValueError, match="gives no gradient a weight"):  # the retain weight has nothing to weigh
        accepted({}, Sum(0.0, 1.0), retain=False)


def test_a_learning_rate_of_0_is_said_at_both_ends_and_makes_no_card(tmp_path, caplog):
    """Gradients and losses can be looked at without training; nobody takes the model for an unlearned one."""
    trainer = make(tmp_path, learning_rate=0.0)
    assert "`learning_rate` is 0: losses and gradients will be logged" in caplog.text
    caplog.clear()
    trainer.train()
    assert "Nothing was trained: none of" in caplog.text and "because `learning_rate` is 0." in caplog.text
    trainer.save_model()
    assert not (tmp_path / "README.md").exists()


class Zero(TrainerCallback):
    """The learning rate is 0 after all."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = 0.0


class Spoil(TrainerCallback):
    """After a step, one weight becomes `value`."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            kwargs["model"].lm_head.weight.data[0, 0] = self.value


def test_a_training_that_changed_nothing_is_an_error_without_a_card(tmp_path):
    trainer = make(tmp_path, callbacks=[Zero()], max_steps=2)
    with pytest.raises(
        RuntimeError, match=r"Nothing was trained: none of 2 steps.*learning rate 0.003, weights in float32"
    ):
        trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "README.md").exists()
    assert not (tmp_path / ".training").exists()


def test_updates_below_the_precision_of_bfloat16_are_no_training(tmp_path):
    trainer = make(tmp_path, model=tiny_llama().bfloat16(), learning_rate=1e-9, weight_decay=0.0)
    with pytest.raises(RuntimeError, match=r"lost in rounding .*weights in bfloat16"):
        trainer.train()


def test_the_smallest_change_of_one_weight_is_seen():
    model = nn.Linear(257, 3)
    health = HealthCallback()
    health.on_train_begin(None, TrainerState(), None, model=model)
    assert not health.moved(model) and health.fault(model) is None
    for shape in ((1, 100), (2, 256)):
        before = model.weight.data[shape].clone()
        model.weight.data[shape] = torch.nextafter(before, torch.tensor(9.0))
        assert health.moved(model)
        model.weight.data[shape] = before
        assert not health.moved(model)
    model.bias.requires_grad_(False)  # another choice of parameters
    assert health.moved(model)


# ---- ruined weights ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2 * GROWTH])
def test_the_last_good_checkpoint_stays_and_is_named(tmp_path, value):
    trainer = make(
        tmp_path, callbacks=[Spoil(2, value)], max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
    )
    with pytest.raises(
        FloatingPointError, match=r"ruined the model: after step 2 .*not saved.*checkpoint-1'"
    ) as raised:
        trainer.train()
    assert "\n" not in str(raised.value) and trainer.args.save_total_limit == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".training", "checkpoint-1"]
    with pytest.raises(FloatingPointError, match="ruined"):
        trainer.save_model()
    assert not (tmp_path / "README.md").exists() and not (tmp_path / "model.safetensors").exists()


def test_ruined_weights_are_told_at_the_end_and_at_the_first_skipped_step(tmp_path, caplog):
    with pytest.raises(FloatingPointError, match=r"after step 1 the largest weight is 1e\+30.*No checkpoint was saved"):
        make(tmp_path / "end", learning_rate=1e30).train()
    with pytest.raises(FloatingPointError, match="after step 1 the largest weight"):
        make(tmp_path / "skip", learning_rate=1e30, max_steps=3).train()
    assert "weights are unchanged" not in caplog.text
    assert not list(tmp_path.glob("*/README.md"))


def test_a_model_that_is_broken_before_training_is_refused(tmp_path):
    model = tiny_llama()
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite before training"):
        make(tmp_path, model=model).train()


@pytest.mark.parametrize("rule", [BLUR(alpha=1e38), Sum(1e38, 1.0), Sum(1e20, 1.0)], ids=repr)
def test_weights_of_a_rule_that_overflow_skip_the_step(tmp_path, rule):
    """The Gramian is finite, the combination or its norm is not: clipping would turn it into 0 or NaN."""
    trainer = make(tmp_path, rule)
    with pytest.raises(RuntimeError, match="all of them were skipped"):
        trainer.train()
    assert trainer.state.log_history[0]["grad/skipped"] == 1
    assert distance(weights(tiny_llama()), weights(trainer.model)) == 0


# ---- the last lines ----


def words(forget, retain, objectives=None, skipped=0, until=None):
    history = [
        {"step": step, "loss/forget": f, "loss/retain": r}
        for step, (f, r) in enumerate(zip(forget, retain, strict=True), 1)
    ]
    history += [{"step": len(history) + 1, "grad/skipped": skipped}] if skipped else []
    state = TrainerState(log_history=[*history, {"step": 9, "train_runtime": 1.0}], global_step=10)
    roles = dict(zip(("forget", "retain"), objectives or (GradAscent(), NLL()), strict=True))
    return ending.last_words(state, roles, 1000, until)


def test_what_is_said_of_a_collapse():
    cases = {
        "the retain loss": (words([-3, -4], [2, 4.1]), ["The retain loss rose from 2 to 4.1"]),
        "the divergence": (words([5, 4], [0, 2.5], (NPO(), KL())), ["The retain loss rose from 0 to 2.5"]),
        "ascent": (words([-3, -842], [2, 2]), ["Gradient ascent ran away: 842 nats per token"]),
        "both": (words([-3, -842], [2, 9]), ["The retain loss", "Gradient ascent"]),
        "unmoved": (words([13.8629, 13.8600], [2, 2], (NPO(), NLL())), ["The forget loss has not moved (13.8629"]),
        "skipped": (words([-3, -4], [2, 2], skipped=6), ["6 of 10 steps were skipped"]),
        "healthy": (words([-3, -9], [2, 3.5]), []),
        "another unit": (words([-3, -842], [2, 9], (NPO(), SimpleNamespace())), []),
        "the best one, not the last": (words([-3, -4, -842], [2, 2, 9], until=2), []),
        "one log": (words([-3], [9]), []),
        "no log": (words([], []), []),
        "a few skips": (words([-3, -4], [2, 2], skipped=5), []),
    }

    def said(found, expected):
        assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found

    every(cases, said)


def test_a_run_that_collapses_says_so_and_a_normal_one_is_silent(tmp_path, caplog):
    def said(folder, **config):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="blur_trainer"):
            make(tmp_path / folder, **config).train()
        return [r.getMessage() for r in caplog.records if r.name == "blur_trainer.trainers.running"]

    assert said("normal", max_steps=6) == []
    assert "Gradient ascent ran away" in " ".join(said("collapse", rule=Sum(1.0, 0.0), max_steps=6, learning_rate=0.5))
    (line,) = said("idle", max_steps=3, learning_rate=1e-9, rule=Sum(1.0, 0.0), forget=FORGET[:2])
    assert "has not moved" in line


def test_the_model_saved_last_is_the_good_one(tmp_path):
    """A normal training with checkpoints: the bits of the model that was checked are those that were saved."""
    trainer = make(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    assert distance(weights(trainer.model), load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == 0
