"""Steps without a finite gradient, through the real trainer: nothing moves, it is said, and training goes on."""

import copy
import logging
import math
import signal
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from support.models import examples, tiny_llama
from support.runs import distance, settings, train, training_logs, weights
from transformers import TrainerCallback

from blur_trainer.gradients.rules import BLUR, MGDA, PCGrad, Sum
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.blur import BLURTrainer

STEPS, BATCH = 5, 2
FORGET, RETAIN = examples(STEPS * BATCH, seed=5), examples(1, seed=6)  # one retain example: any pairing is the same
NAN, INF = float("nan"), float("inf")
CONFIG = {
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "gamma": 0.5,
}


@dataclass(frozen=True)
class Broken(Objective):
    """`objective`, whose loss is multiplied by `value` in its calls number `at` (from 0, one per micro-batch)."""

    objective: Objective
    at: tuple[int, ...]
    value: float = NAN
    calls: list = field(default_factory=list, compare=False)
    needs_reference: ClassVar[bool] = False

    def losses(self, model, batch, reference):
        self.calls.append(batch["input_ids"].shape)
        losses = self.objective.losses(model, batch, reference)
        return losses * self.value if len(self.calls) - 1 in self.at else losses


class Snapshots(TrainerCallback):
    """Weights, optimizer state and learning rate after each step; index 0 is before the first."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights, self.optimizer, self.rates = [weights(kwargs["model"])], [{}], []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(weights(kwargs["model"]))
        self.optimizer.append(copy.deepcopy(kwargs["optimizer"].state_dict()["state"]))
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def run(tmp_path, at=(), value=NAN, role="forget", forget=FORGET, rule=None, snapshots=None, **config):
    healthy = {"forget": GradAscent(), "retain": NLL()}
    objectives = healthy | {role: Broken(healthy[role], tuple(at), value)}
    return train(
        settings(tmp_path, **(CONFIG | config)),
        forget,
        RETAIN,
        forget_objective=objectives["forget"],
        retain_objective=objectives["retain"],
        rule=rule,
        callbacks=[snapshots] if snapshots else None,
    )


def without(*steps, batch=BATCH):
    """The forget rows without those of the given steps (from 0)."""
    return [row for index, row in enumerate(FORGET) if index // batch not in steps]


def same_state(a, b):
    assert a.keys() == b.keys()
    for key, entry in a.items():
        assert entry.keys() == b[key].keys()
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key][name])), (key, name)


# ---- nothing moves ----


@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30], ids=["nan", "inf", "-inf", "norm overflows"])
def test_a_skipped_step_leaves_weights_and_moments_alone(role, value, tmp_path):
    """Weight decay does not act either, and AdamW's step counters (its bias correction) stay."""
    seen = Snapshots()
    run(tmp_path, at=[2], value=value, role=role, snapshots=seen)
    assert len(seen.weights) == STEPS + 1
    for step in range(STEPS):
        moved = distance(seen.weights[step], seen.weights[step + 1])
        assert (moved == 0) == (step == 2), f"step {step + 1} moved the weights by {moved}"
    same_state(seen.optimizer[2], seen.optimizer[3])
    assert {int(entry["step"]) for entry in seen.optimizer[3].values()} == {2}
    assert {int(entry["step"]) for entry in seen.optimizer[5].values()} == {4}


@pytest.mark.parametrize("at", [[0], [2], [4], [1, 2], [0, 4]], ids=str)
def test_the_trajectory_is_that_without_the_skipped_windows(at, tmp_path):
    got = run(tmp_path / "a", at=at)
    want = run(tmp_path / "b", forget=without(*at))
    assert distance(weights(tiny_llama()), weights(want.model)) > 1e-3
    assert distance(weights(got.model), weights(want.model)) == 0
    assert got.state.global_step == STEPS


def test_a_skipped_first_step_leaves_no_state_behind(tmp_path):
    seen = Snapshots()
    run(tmp_path, at=[0], snapshots=seen)
    assert distance(weights(tiny_llama()), seen.weights[1]) == 0
    assert seen.optimizer[1] == {}


@pytest.mark.parametrize("call", [2, 3], ids=["first micro-batch", "last micro-batch"])
@pytest.mark.parametrize("role", ["forget", "retain"])
def test_one_bad_micro_batch_skips_its_window_only(role, call, tmp_path):
    """Windows of two: the healthy half is not used, and nothing of the window is left for the next one."""
    config = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    got = run(tmp_path / "a", at=[call], role=role, **config)
    want = run(tmp_path / "b", forget=without(1), **config)
    assert distance(weights(got.model), weights(want.model)) == 0
    assert [entry.get("grad/skipped") for entry in training_logs(got)] == [None, 1.0, None, None, None]


@pytest.mark.parametrize("rule", [BLUR(), BLUR(lower_level="retain", clamp=True), Sum(), PCGrad(), MGDA()], ids=repr)
@pytest.mark.parametrize("role", ["forget", "retain"])
def test_every_rule_skips(rule, role, tmp_path):
    seen = Snapshots()
    trainer = run(tmp_path, at=[1], role=role, rule=rule, snapshots=seen)
    assert distance(seen.weights[1], seen.weights[2]) == 0
    assert distance(seen.weights[2], seen.weights[3]) > 0
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


def test_a_weight_of_zero_does_not_hide_a_broken_gradient(tmp_path):
    """0 * NaN is NaN: `Sum(retain_weight=0)` beside a retain set must not write it."""
    seen = Snapshots()
    run(tmp_path, at=[1], role="retain", rule=Sum(1.0, 0.0), snapshots=seen)
    assert distance(seen.weights[1], seen.weights[2]) == 0


def test_momentum_does_not_coast_through_a_skipped_step(tmp_path):
    config = {"optim": "sgd", "optim_args": "momentum=0.9"}
    got = run(tmp_path / "a", at=[2, 3], **config)
    want = run(tmp_path / "b", forget=without(2, 3), **config)
    assert distance(weights(got.model), weights(want.model)) == 0


def test_the_schedule_counts_skipped_steps(tmp_path):
    """Otherwise a run would end above its final learning rate."""
    broken, healthy = Snapshots(), Snapshots()
    run(tmp_path / "a", at=[1, 2], snapshots=broken, lr_scheduler_type="linear")
    run(tmp_path / "b", snapshots=healthy, lr_scheduler_type="linear")
    assert broken.rates == healthy.rates and len(set(broken.rates)) == STEPS


# ---- it is said ----


def test_a_skip_is_logged_with_its_step_and_norms(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        trainer = run(tmp_path, at=[2])
    (record,) = [record for record in caplog.records if "skipped" in record.getMessage()]
    message = record.getMessage()
    assert record.levelname == "WARNING" and "\n" not in message
    for word in ("Step 3 skipped", "not finite", "||g_forget|| = nan", "||g_retain|| = ", "weights are unchanged"):
        assert word in message
    assert "||g_retain|| = nan" not in message  # which of both it was
    logs = training_logs(trainer)
    assert [entry.get("grad/skipped") for entry in logs] == [None, None, 1.0, None, None]
    for entry in logs:
        broken = [key for key, value in entry.items() if not math.isfinite(value)]
        assert broken == (["loss"] if "grad/skipped" in entry else []), f"NaN in the log: {entry}"  # and no loss of 0
    assert "loss/forget" not in logs[2] and "loss/forget" in logs[3]


def test_means_are_over_the_steps_taken(tmp_path):
    single = training_logs(run(tmp_path / "a", at=[1, 3]))
    (together,) = training_logs(run(tmp_path / "b", at=[1, 3], logging_steps=STEPS))
    assert together["grad/skipped"] == 2.0
    for key in ("loss/forget", "loss/retain", "grad/forget_norm", "grad/cosine", "grad/weight_forget"):
        taken = [entry[key] for entry in single if key in entry]
        assert len(taken) == STEPS - 2
        assert together[key] == pytest.approx(sum(taken) / len(taken), rel=1e-5), key


def test_losses_leave_skipped_steps_out(tmp_path):
    """`loss` stays `w_f loss/forget + w_r loss/retain`, and `train_loss` is its mean over the steps that were taken."""
    trainer = run(tmp_path, at=[1, 4], logging_steps=2, rule=Sum(0.5, 2.0))
    logs, single = training_logs(trainer), training_logs(run(tmp_path / "b", at=[1, 4], rule=Sum(0.5, 2.0)))
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.5 * entry["loss/forget"] + 2 * entry["loss/retain"], rel=1e-5)
    taken = [entry["loss"] for entry in single if "grad/skipped" not in entry]
    assert len(taken) == STEPS - 2 and logs[0]["loss"] == pytest.approx(taken[0], rel=1e-5)
    summary = trainer.state.log_history[-1]
    assert summary["train_loss"] == pytest.approx(sum(taken) / len(taken), rel=1e-5)


def test_a_window_of_skipped_steps_has_no_loss(tmp_path):
    args = settings(tmp_path, **CONFIG)
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, forget_objective=Broken(GradAscent(), at=(1,)))
    output = trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False, False]
    taken = [loss for loss in losses if not math.isnan(loss)]
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(sum(taken) / 4, rel=1e-5)


# ---- too many in a row ----


@pytest.mark.parametrize("limit", [1, 3])
def test_too_many_in_a_row_is_an_error_with_a_remedy(limit, tmp_path):
    args = settings(tmp_path, **(CONFIG | {"max_skipped_steps": limit}))
    objective, seen = Broken(GradAscent(), at=(1, 2, 3)), Snapshots()
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, forget_objective=objective, callbacks=[seen])
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "\n" not in message
    words = (f"{limit} steps in a row", f"step {1 + limit} ", "nan", "learning_rate", "bf16", "`npo`", "`grad_ascent`")
    assert [word for word in words if word not in message] == []
    assert trainer.state.global_step == limit  # the raising step is not counted
    assert distance(seen.weights[1], weights(trainer.model)) == 0, "not those of the last finite step"


def test_a_finite_step_resets_the_count(tmp_path):
    trainer = run(tmp_path, at=[0, 1, 3, 4], max_skipped_steps=3)
    assert trainer.state.global_step == STEPS
    assert [entry.get("grad/skipped") for entry in training_logs(trainer)] == [1.0, 1.0, None, 1.0, 1.0]


def test_the_signals_are_given_back_after_the_error(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FloatingPointError):
        run(tmp_path, at=[0], max_skipped_steps=1)
    assert signal.getsignal(signal.SIGTERM) is before


# ---- rules that answer nonsense ----


@pytest.mark.parametrize("answer", [[NAN, 1.0], [1.0, INF], [NAN, NAN]], ids=str)
def test_a_rule_whose_weights_are_not_finite_is_skipped_too(answer, tmp_path):
    calls = []

    def rule(gramian):
        calls.append(gramian.clone())
        return torch.tensor(answer if len(calls) == 3 else [0.5, 1.0])

    seen = Snapshots()
    got = run(tmp_path / "a", rule=rule, snapshots=seen)
    assert len(calls) == STEPS and all(gramian.isfinite().all() for gramian in calls)
    assert distance(seen.weights[2], seen.weights[3]) == 0
    want = run(tmp_path / "b", rule=Sum(0.5, 1.0), forget=without(2))
    assert distance(weights(got.model), weights(want.model)) == 0
    assert [entry.get("grad/skipped") for entry in training_logs(got)] == [None, None, 1.0, None, None]


# ---- a gradient of exactly zero is no reason to skip ----


def test_a_saturated_forget_objective_is_warned_of_once_and_retain_goes_on(tmp_path, caplog):
    """NPO where the model knows the forget set far less than its reference: sigmoid(-large) is 0 in float32."""
    knows = train(
        settings(tmp_path / "ref", **(CONFIG | {"num_train_epochs": 6})),
        FORGET,
        RETAIN,
        rule=Sum(1.0, 0.0),
        forget_objective=NLL(),
    ).model
    seen = Snapshots()
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        got = train(
            settings(tmp_path / "a", **CONFIG),
            FORGET,
            RETAIN,
            forget_objective=NPO(beta=1e4),
            ref_model=knows,
            callbacks=[seen],
        )
    logs = training_logs(got)
    assert [entry["grad/forget_norm"] for entry in logs] == [0.0] * STEPS, "not saturated: the test proves nothing"
    assert [entry["grad/cosine"] for entry in logs] == [0.0] * STEPS
    assert not any("grad/skipped" in entry for entry in logs)
    messages = [record.getMessage() for record in caplog.records if "gradient is exactly 0" in record.getMessage()]
    assert len(messages) == 1 and "forget" in messages[0] and "saturated" in messages[0]
    assert all(distance(a, b) > 0 for a, b in zip(seen.weights, seen.weights[1:], strict=False))
    want = run(tmp_path / "b", rule=Sum(0.0, 1.0))  # retain alone
    assert distance(weights(got.model), weights(want.model)) == 0


def test_a_retain_gradient_of_zero_is_warned_of_by_its_name(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        trainer = run(tmp_path, at=range(STEPS), value=0.0, role="retain")
    messages = [record.getMessage() for record in caplog.records if "exactly 0" in record.getMessage()]
    assert len(messages) == 1 and "The retain gradient" in messages[0]
    assert distance(weights(tiny_llama()), weights(trainer.model)) > 1e-3


def test_where_a_zero_gradient_gets_all_the_weight_nothing_acts(tmp_path, caplog):
    """The shortest vector in the hull of 0 and anything is 0: MGDA stands still, and says so."""
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        trainer = run(tmp_path, at=range(2, STEPS), value=0.0, rule=MGDA(), weight_decay=0.0)
    (message,) = [record.getMessage() for record in caplog.records if "exactly 0" in record.getMessage()]
    assert "nothing is changed" in message and "only the other one acts" not in message
    assert training_logs(trainer)[-1]["grad_norm"] == 0


def test_a_first_step_of_zero_is_no_saturation(tmp_path, caplog):
    """A distance to the frozen model begins at 0."""
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        run(tmp_path, at=[0], value=0.0, role="retain")
    assert not any("exactly 0" in record.getMessage() for record in caplog.records)


# ---- with a loss scaler (fp16): it does the skipping ----


class TellAccelerate(TrainerCallback):
    """From here on clipping unscales, as under fp16. Too late for the model, whose forward stays in float32."""

    def __init__(self, tell):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell()


@pytest.fixture
def scaled(tmp_path, monkeypatch):
    """A training under a loss scaler, which accelerate refuses on CPUs: so it is told after construction."""

    def start(scale, rule, *, autocast=False, **config):
        args = settings(tmp_path / str(scale), **(CONFIG | config))
        trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, forget_objective=GradAscent(), rule=rule)
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        def tell():
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
            accelerator.native_amp = True

        if autocast:
            tell()
        else:
            trainer.add_callback(TellAccelerate(tell))
        try:
            trainer.train()
        except RuntimeError as error:
            assert "all of them were skipped" in str(error)
        monkeypatch.undo()
        return trainer

    return start


GRADIENTS = ("loss", "grad/forget_norm", "grad/retain_norm", "grad/cosine", "grad/weight_forget", "grad_norm")


@pytest.mark.parametrize("rule", [BLUR(gamma=0.5), Sum(0.5, 1.0)], ids=repr)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "float16"])
def test_a_loss_scale_changes_nothing(rule, autocast, tmp_path, scaled):
    """Neither the steps, clipped after unscaling, nor what is logged of the gradients."""
    plain, under = run(tmp_path, rule=rule, optim="sgd"), scaled(2.0**12, rule, autocast=autocast, optim="sgd")
    assert under.accelerator.scaler.get_scale() == 2.0**12
    moved = distance(weights(tiny_llama()), weights(plain.model))
    assert moved > 1e-3
    error = distance(weights(plain.model), weights(under.model))
    assert error < (2e-2 if autocast else 1e-5) * moved
    assert (error > 1e-5 * moved) == autocast, "autocast was not what this case says"
    for a, b in zip(training_logs(plain), training_logs(under), strict=True):
        for key in GRADIENTS:
            assert a[key] == pytest.approx(b[key], rel=1e-2 if autocast else 1e-4, abs=1e-3 if autocast else 1e-5), key


@pytest.mark.parametrize("rule", [BLUR(gamma=0.5), Sum(0.5, 1.0)], ids=repr)
@pytest.mark.parametrize("scale", [2.0**66, 2.0**127], ids=["only the norm overflows", "the gradient overflows"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "float16"])
def test_an_overflow_lowers_the_scale_and_moves_nothing(rule, scale, autocast, scaled):
    """Also where the gradient is finite and its square is not: a step logged as skipped has to be skipped."""
    trainer = scaled(scale, rule, autocast=autocast)
    skipped = sum(entry.get("grad/skipped", 0.0) for entry in training_logs(trainer))
    assert skipped >= 2
    assert trainer.accelerator.scaler.get_scale() == scale / 2**skipped
    taken = {int(entry["step"]) for entry in trainer.optimizer.state_dict()["state"].values()}
    assert taken == {STEPS - skipped}
    assert trainer.nothing_trained == (skipped == STEPS)
    if skipped == STEPS:
        assert distance(weights(tiny_llama()), weights(trainer.model)) == 0


def test_after_an_overflow_training_goes_on_at_the_lower_scale(scaled):
    """In float16, from torch's own initial scale times 2^10, within the steps of a short run."""
    trainer = scaled(2.0**26, BLUR(gamma=0.5), autocast=True, num_train_epochs=5)
    logs = training_logs(trainer)
    skips = [entry.get("grad/skipped") == 1.0 for entry in logs]
    assert skips[0] and not any(skips[-5:])
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (26 - sum(skips))
    assert distance(weights(tiny_llama()), weights(trainer.model)) > 1e-3
