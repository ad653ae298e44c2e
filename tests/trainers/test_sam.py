"""SAM: the forget gradient is that at moved weights, which come back bit for bit."""

import copy

import pytest
import torch
from support import reference
from support.models import examples, tiny_llama
from support.runs import settings, training_logs
from test_step import LEARNING_RATE, RULES, STEPS, literal, ours, update_error, windows

from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.perturbation import perturbed
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.procedures import SAM


def backend(model):
    from accelerate import Accelerator

    return GradientBackend(Accelerator(cpu=True), model)


@pytest.mark.parametrize("name", ["blur", "sum"])
def test_trained_weights_are_those_of_the_literal_form(name, tmp_path):
    rule, direction = RULES[name]
    start, rho = tiny_llama(0), 0.5
    got = ours(copy.deepcopy(start), tmp_path, rule, sam_rho=rho).model
    losses = {"forget": lambda m, rows: -reference.token_mean_nll(m, rows), "retain": reference.token_mean_nll}
    rates = [LEARNING_RATE] * STEPS
    want = reference.train(copy.deepcopy(start), windows(), losses, direction, learning_rates=rates, sam_rho=rho)
    assert update_error(got, want, start) < 2e-4
    assert update_error(got, literal(copy.deepcopy(start), direction), start) > 1e-2  # rho is not for nothing


def test_weights_are_moved_and_come_back_bit_for_bit():
    model = tiny_llama(0)
    kept, held = copy.deepcopy(model.state_dict()), backend(model)
    gradients = [torch.randn_like(p) for p in held.parameters]
    gradients[0] = None  # a parameter that the objective does not reach
    held.slots["forget"] = [None if g is None else g.clone() for g in gradients]
    with pytest.raises(RuntimeError, match="inside"), perturbed(held, "forget", 0.3):
        for p, g, old in zip(held.parameters, gradients, kept.values(), strict=True):
            torch.testing.assert_close(p.data, old if g is None else old + 0.3 * g)
        raise RuntimeError("inside")  # weights come back after an error too
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert "forget" not in held.slots


def test_weights_of_another_type_than_their_gradients():
    model = tiny_llama(0).bfloat16()
    kept, held = copy.deepcopy(model.state_dict()), backend(model)
    held.slots["forget"] = [torch.ones_like(p, dtype=torch.float32) for p in held.parameters]
    with perturbed(held, "forget", 1.0):
        assert all((p.data != old).all() for p, old in zip(held.parameters, kept.values(), strict=True))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_logged_loss_is_that_of_the_weights_as_they_are(tmp_path):
    logs = []
    for rho in (None, 0.5):
        args = settings(tmp_path / str(rho), max_steps=1, sam_rho=rho)
        trainer = BLURTrainer(tiny_llama(), args, examples(4), examples(4, 1))
        trainer.train()
        logs.append(training_logs(trainer)[0])
    assert logs[0]["loss/forget"] == logs[1]["loss/forget"]
    assert logs[0]["grad/forget_norm"] != logs[1]["grad/forget_norm"]


class Saturated(NPO):
    """A forget loss without a gradient."""

    def losses(self, model, batch, reference):
        return super().losses(model, batch, reference) * 0.0


def test_without_a_direction_the_weights_stay_where_they_are(tmp_path, caplog):
    args = settings(tmp_path, max_steps=2)
    retain = examples(4, 1)
    trainer = BLURTrainer(
        tiny_llama(), args, examples(4), retain, forget_objective=Saturated(), forget_procedure=SAM(0.5)
    )
    trainer.train()
    assert all(entry["grad/forget_norm"] == 0.0 for entry in training_logs(trainer))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_settings():
    with pytest.raises(ValueError, match="`sam_rho` must be a number above 0"):
        settings("out", sam_rho=0.0)
    with pytest.raises(ValueError, match="SAM: `rho` must be a number above 0"):
        SAM(-1.0)
    with pytest.raises(ValueError, match="`single_gradient_buffer=True`, but a `forget_procedure`"):
        BLURTrainer(
            tiny_llama(), settings("out", sam_rho=0.1, single_gradient_buffer=True), examples(4), examples(4, 1)
        )
    with pytest.raises(TypeError, match=r"`forget_procedure` must be a procedure such as `SAM\(rho=0.01\)`"):
        BLURTrainer(tiny_llama(), settings("out"), examples(4), examples(4, 1), forget_procedure=SAM)
    trainer = BLURTrainer(tiny_llama(), settings("out", sam_rho=0.1), examples(4), examples(4, 1))
    assert trainer.forget_procedure == SAM(0.1) and trainer.method == "BLUR-NPO-SAM"


def test_a_move_that_16_bits_cannot_see_is_said(caplog):
    cases = [(False, torch.float32, False), (True, torch.float32, True), (False, torch.bfloat16, True)]
    for bf16, dtype, said in cases:
        caplog.clear()
        args = settings("out", sam_rho=0.01, bf16=bf16)
        BLURTrainer(tiny_llama().to(dtype), args, examples(4), examples(4, 1))
        assert ("most moves are lost in rounding" in caplog.text) == said
