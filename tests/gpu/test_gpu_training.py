"""Trainings on the device log and end as the same trainings on the CPU, to rounding. Against the literal: the cells."""

import copy

import pytest
import torch
from peft import LoraConfig
from support.device import DEVICE, device_of, off, on_cpu, on_device, on_host
from support.models import examples, tiny_llama
from support.runs import training_logs

from blur_trainer.gradients.rules import BLUR
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.objectives.preference import NPO, SimNPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.unlearning import UnlearningConfig, UnlearningTrainer
from blur_trainer.uld.trainer import ULDConfig, ULDTrainer

FORGET, RETAIN = examples(8, seed=5), examples(5, seed=6)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
RMU_ON = {"train_layers": "0,1", "train_parameters": "down_proj|o_proj"}
#: objectives and settings
WAYS = {
    "BLUR-NPO": ({"forget_objective": NPO()}, {}),
    "BLUR-NPO, precomputed": ({"forget_objective": NPO()}, {"precompute_ref_logps": True}),
    "NPO and KL": ({"forget_objective": NPO(), "retain_objective": KL()}, {}),
    "SimNPO, accumulated": ({"forget_objective": SimNPO()}, {"gradient_accumulation_steps": 2}),
    "RMU": ({"forget_objective": RMU(1, coefficient=3.0), "retain_objective": ActivationMatch(1)}, RMU_ON),
    "RMU and NLL": ({"forget_objective": RMU(1, coefficient=3.0), "retain_objective": NLL()}, RMU_ON),
}
KEYS = ("loss", "loss/forget", "loss/retain", "grad/forget_norm", "grad/retain_norm", "grad/cosine", "grad_norm")


def both(make, tmp_path):
    """Trained on the CPU, and on the device."""
    trainers = []
    for name, settings in (("cpu", on_cpu), ("device", on_device)):
        trainer = make(tmp_path / name, settings)
        start = on_host(trainer.model)
        trainer.train()
        trainers.append(trainer)
    assert device_of(trainers[1].model) == DEVICE.type
    return *trainers, start


def compare(cpu, device, start):
    for a, b in zip(training_logs(cpu), training_logs(device), strict=True):
        for key in (key for key in KEYS if key in a):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
    assert off(on_host(device.model), on_host(cpu.model), start) <= 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_the_device_trains_as_the_cpu_does(way, tmp_path):
    objectives, config = WAYS[way]

    def make(folder, settings):
        args = settings(folder, UnlearningConfig, learning_rate=1e-2, max_steps=3, **config)
        given = copy.deepcopy(objectives)
        return UnlearningTrainer(tiny_llama(layers=3), args, FORGET, RETAIN, rule=BLUR(gamma=0.5), **given)

    compare(*both(make, tmp_path))


def test_an_adapter_trains_as_on_the_cpu(tmp_path):
    """The reference is the model with its adapter off."""

    def make(folder, settings):
        args = settings(folder, UnlearningConfig, learning_rate=1e-2, max_steps=3)
        kwargs = {"forget_objective": NPO(), "rule": BLUR(gamma=0.5), "peft_config": LORA}
        torch.manual_seed(0)  # the adapter is drawn
        return UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, **kwargs)

    cpu, device, start = both(make, tmp_path)
    compare(cpu, device, start)
    assert all(p.any() for name, p in device.model.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model with a name."""
    folder = tmp_path_factory.mktemp("models") / "target"
    tiny_llama(0, layers=4).save_pretrained(folder)
    return str(folder)


def test_uld_trains_and_generates_as_on_the_cpu(tmp_path, target):
    def make(folder, settings):
        uld = {"num_assistant_layers": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "max_steps": 4}
        args = settings(folder, ULDConfig, **uld)
        torch.manual_seed(0)
        more = {"augment_forget": examples(4, seed=3), "augment_retain": examples(5, seed=4)}
        return ULDTrainer(target, args, FORGET, RETAIN, peft_config=LORA, **more)

    cpu, device, start = both(make, tmp_path)
    compare(cpu, device, start)
    prompts = {"input_ids": torch.tensor([[0, 0, 5, 9, 13], [1, 17, 21, 5, 30]])}
    prompts["attention_mask"] = (prompts["input_ids"] > 0).long()
    texts = []
    for trainer in (cpu, device):
        unlearned = trainer.unlearned_model()
        assert isinstance(unlearned, LogitDifferenceModel)
        there = {name: value.to(unlearned.device) for name, value in prompts.items()}
        for cached in (True, False):
            ids = unlearned.generate(**there, max_new_tokens=6, do_sample=False, use_cache=cached)
            texts.append(ids.cpu().tolist())
    assert all(text == texts[0] for text in texts[1:])
    device.save_model()
    again = LogitDifferenceModel.from_pretrained(device.args.output_dir).to(DEVICE)
    ids = prompts["input_ids"].to(DEVICE)
    torch.testing.assert_close(again(ids).logits, device.unlearned_model()(ids).logits)
