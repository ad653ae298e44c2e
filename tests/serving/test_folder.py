"""What a server reads of a logit-difference model's folder, and what it refuses."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.models import tiny_llama

from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.serving.folder import check_served, tensors_of


@pytest.fixture
def folder(tmp_path):
    target = tiny_llama()
    target.save_pretrained(tmp_path / "target")
    assistant = lora_assistant(target, 1, LoraConfig(r=2, target_modules=["q_proj"]))
    config = LogitDifferenceConfig(target=str(tmp_path / "target"))
    LogitDifferenceModel(config, target, assistant).save_pretrained(tmp_path / "composed")
    return tmp_path / "composed"


def test_adapter_and_target_are_found(folder):
    config = LogitDifferenceConfig.from_pretrained(folder)
    found = tensors_of(str(folder), None, config)
    assert found.target == (str(folder.parent / "target"), None)
    assert found.adapter == "assistant/adapter_model.safetensors" and (folder / found.adapter).is_file()
    assert found.lora.r == 2 and found.lora.target_modules == {"q_proj"}
    for file in (folder / "assistant").iterdir():  # as a checkpoint of a training has them
        file.rename(folder / file.name)
    assert tensors_of(str(folder), None, config).adapter == "adapter_model.safetensors"
    config.target = "../target"  # beside the folder
    assert tensors_of(str(folder), None, config).target.name == str(folder / "../target")


def test_another_target_is_refused(folder):
    config = LogitDifferenceConfig.from_pretrained(folder)
    weights = folder.parent / "target" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="is not the model that was there"):
        tensors_of(str(folder), None, config)
    config.target = "elsewhere"
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        tensors_of(str(folder), None, config)


def test_what_is_not_served_is_refused_by_name(folder):
    config = LogitDifferenceConfig.from_pretrained(folder)
    check_served(config, "auto", quantized=False)
    refused = [
        ("quantization is not supported", {}, ("auto", True)),
        ("load_format='dummy'", {}, ("dummy", False)),
        ("The assistant is over another model", {"assistant": "other"}, ("auto", False)),
        ("names no target", {"target": None}, ("auto", False)),
        ("names no target", {"num_assistant_layers": None}, ("auto", False)),
        ("weight=inf", {"weight": torch.inf}, ("auto", False)),
        ("top_logit_filter=2", {"top_logit_filter": 2}, ("auto", False)),
    ]
    for message, changes, given in refused:
        changed = LogitDifferenceConfig.from_pretrained(folder)
        for name, value in changes.items():
            setattr(changed, name, value)
        with pytest.raises(ValueError, match=message):
            check_served(changed, *given)
