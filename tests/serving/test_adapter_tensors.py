"""What a LoRA adds to which layer, read from its file: as PEFT computes it. Where vLLM keeps a layer."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.models import tiny_llama

from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.serving.adapter_tensors import place_among, plain_lora

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "o_proj": ["o_proj"]}
LORAS = {
    "all layers": {"target_modules": "all-linear"},
    "rank-stabilized": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 7},
    },
}


def saved(tmp_path, **kwargs):
    model = lora_assistant(tiny_llama(), 1, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **kwargs))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    return model, load_file(tmp_path / "adapter_model.safetensors"), LoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("kwargs", LORAS.values(), ids=LORAS)
def test_what_is_added_is_what_peft_adds(kwargs, tmp_path):
    model, tensors, lora = saved(tmp_path, **kwargs)
    assert isinstance(model, PeftModel)
    found = plain_lora(tensors, lora)
    layers = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert found.keys() == layers.keys() and len(found) >= 2
    for name, (first, second, scale) in found.items():
        torch.testing.assert_close(scale * second @ first, layers[name])


def test_more_than_a_plain_lora_is_refused(tmp_path):
    _, tensors, lora = saved(tmp_path, target_modules=["q_proj"])
    key = next(iter(tensors))
    with pytest.raises(ValueError, match=r"magnitude_vector\.weight', which is no plain LoRA"):
        plain_lora(tensors | {key.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}, lora)
    with pytest.raises(ValueError, match=r"not complete: half of model\.layers\.0\.self_attn\.q_proj"):
        plain_lora({key: tensors[key]}, lora)
    with pytest.raises(ValueError, match="not complete: no tensors"):
        plain_lora({}, lora)
    for name in ("use_dora", "modules_to_save"):
        with pytest.raises(ValueError, match=f"sets {name}, which is no plain LoRA"):
            plain_lora(tensors, LoraConfig(**{name: ["lm_head"] if name == "modules_to_save" else True}))


def test_a_layer_is_found_among_those_that_vllm_fuses():
    assert place_among(FUSED, "model.layers.3.self_attn.v_proj") == ("model.layers.3.self_attn.qkv_proj", 2)
    assert place_among(FUSED, "model.layers.3.mlp.gate_proj") == ("model.layers.3.mlp.gate_up_proj", 0)
    for name in ("model.layers.3.mlp.down_proj", "model.layers.3.self_attn.o_proj", "h.0.attn.qkv_proj", "v_projector"):
        assert place_among(FUSED, name) == (name, None)
    assert place_among({}, "a.q_proj") == ("a.q_proj", None)
