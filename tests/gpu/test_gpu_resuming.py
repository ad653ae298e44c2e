"""A training that is continued on the device, or that evaluates on the way, is the one that does neither.

Dropout draws from the device's own generator, which a checkpoint keeps and an evaluation must give back.
"""

import json
import shutil

import pytest
import torch
from support.device import CARD, DEVICE, device_of, off, on_device, on_host
from support.models import examples, tiny_llama
from support.runs import train, training_logs, weights
from transformers import AutoModelForCausalLM

from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.blur import BLURTrainer

DATA = examples(8, seed=5), examples(5, seed=6)
EVERY_OTHER = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
#: of the way: a kernel may add in another order, a lost dropout mask is more than this by far
ROUNDING = 1e-4 if CARD else 0.0
pytestmark = pytest.mark.usefixtures("same_sums")


def fresh():
    return tiny_llama(dropout=0.3, attn_implementation="eager")


START = weights(fresh())


def run(folder, **config):
    kwargs = {name: config.pop(name) for name in ("benchmarks", "eval_dataset") if name in config}
    resume = config.pop("resume", None)
    trainer = BLURTrainer(
        fresh(),
        on_device(folder, learning_rate=1e-2, fused_lm_head=False, **config),
        *DATA,
        forget_objective=NPO(),
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    torch.use_deterministic_algorithms(True, warn_only=True)
    return run(tmp_path_factory.mktemp("straight"), **EVERY_OTHER)


def test_dropout_draws_from_the_device(straight):
    """Else the tests below would prove nothing: without the device's state they end elsewhere."""
    model, ids = straight.model.train(), torch.tensor([[1, 5, 9, 13]], device=DEVICE)
    assert device_of(model) == DEVICE.type
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)


@pytest.mark.parametrize("way", ["precomputed", "live"])
def test_a_resumed_training_goes_the_same_way(tmp_path, straight, way):
    precomputed = {"precompute_ref_logps": way == "precomputed"}
    whole = straight if way == "live" else run(tmp_path / "whole", **EVERY_OTHER, **precomputed)
    shutil.copytree(whole.args.output_dir, tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-4"))
    torch.rand(7, device=DEVICE)  # a fresh process has drawn otherwise
    again = run(tmp_path / "again", resume=True, **EVERY_OTHER, **precomputed)
    assert off(on_host(again.model), on_host(whole.model), START) <= ROUNDING
    for a, b in zip(training_logs(whole), training_logs(again), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["step"] == b["step"]


def test_the_checkpoint_keeps_the_devices_random_state(straight):
    state = torch.load(f"{straight.args.output_dir}/checkpoint-2/rng_state.pth", weights_only=False)
    assert {"python", "numpy", "cpu"} <= state.keys() and ("cuda" in state) == torch.cuda.is_available()


def test_what_is_saved_loads_on_the_cpu_as_what_was_trained(straight, tmp_path):
    straight.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert device_of(model) == "cpu"
    assert all(
        torch.equal(value, straight.model.state_dict()[name].cpu()) for name, value in model.state_dict().items()
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"


def test_an_evaluation_on_the_schedule_changes_no_training(tmp_path, straight):
    """Neither Trainer's own, whose loader draws, nor a benchmark that draws on CPU and device, and generates."""
    seen = []

    def benchmark(model):
        torch.rand(5), torch.rand(5, device=DEVICE)
        ids = model.generate(torch.tensor([[1, 5]], device=DEVICE), max_new_tokens=3, do_sample=True)
        seen.append((device_of(model), model.training, ids.shape[0]))
        return {"x": float(len(seen))}

    hold = {"hold": examples(3, seed=7)}
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    trainer = run(tmp_path, benchmarks={"b": benchmark}, eval_dataset=hold, **schedule)
    assert seen == [(DEVICE.type, False, 1)] * 4
    assert off(on_host(trainer.model), on_host(straight.model), START) <= ROUNDING
    logged = [entry for entry in trainer.state.log_history if "eval_b_x" in entry]
    assert [entry["eval_b_x"] for entry in logged] == [1.0, 2.0, 3.0, 4.0]


def test_a_reference_with_dropout_says_the_same_each_time(tmp_path):
    """KL against a frozen copy: it is in evaluation mode on the device too."""
    args = on_device(tmp_path, max_steps=1, learning_rate=1e-2)
    trainer = train(args, *DATA, fresh(), forget_objective=NPO(), retain_objective=KL())
    reference = trainer.reference.model
    ids = torch.tensor([[1, 5, 9, 13]], device=DEVICE)
    assert device_of(reference) == DEVICE.type and torch.equal(reference(ids).logits, reference(ids).logits)
