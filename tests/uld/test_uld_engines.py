"""ULD with two processes (gloo, CPU): on every engine the assistant of one process, saved for all to load."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.cases import chosen
from support.models import tiny_llama
from support.processes import SUPPORT, forked
from support.uld_worker import ENGINES, make
from transformers import AutoModelForCausalLM

from blur_trainer.models.logit_difference import LogitDifferenceModel

pytestmark = pytest.mark.distributed
EVERY = [pytest.param(name, marks=pytest.mark.full) if name == "zero2" else name for name in ENGINES]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uld")
    tiny_llama(0, layers=4).save_pretrained(folder / "target")
    forked(SUPPORT / "uld_worker.py", str(folder), ",".join(chosen(request, "engine")))
    trainer = make(str(folder / "target"), folder / "one", 4, use_cpu=True)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.mark.parametrize("engine", EVERY)
def test_two_processes_train_the_assistant_of_one(folder, engine):
    one, two = (load_file(folder / name / "assistant" / "adapter_model.safetensors") for name in ("one", engine))
    assert one.keys() == two.keys()
    distance = sum((one[name] - two[name]).double().square().sum() for name in one)
    moved = sum(value.double().square().sum() for name, value in one.items() if "lora_B" in name)  # which began at 0
    assert (distance / moved).sqrt() < 1e-4


@pytest.mark.parametrize("engine", EVERY)
def test_the_saved_model_loads_by_itself(folder, engine):
    ids = torch.tensor([[1, 5, 9, 13, 17]])
    model = AutoModelForCausalLM.from_pretrained(folder / engine)
    assert isinstance(model, LogitDifferenceModel)
    expected = AutoModelForCausalLM.from_pretrained(folder / "one")(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-4)


def test_sharing_weights_with_a_sharded_assistant_is_refused(folder):
    said = json.loads((folder / "said.json").read_text())
    assert said.pop("ddp") == "" and {"fsdp2", "zero3"} <= said.keys()
    for told in said.values():
        assert "give the model by name" in told and "sharded: call `save_model()`" in told
