"""bitsandbytes on the device: an adapter of 4-bit weights, 8-bit weights scored, 8-bit and paged optimizers.

Its kernels for GPUs are others than those for CPUs, which the dry run takes where there are any.
"""

import copy

import pytest
import torch
from peft import LoraConfig
from support.device import CARD, DEVICE, needs, needs_card, off, on_device, on_host
from support.models import examples, tiny_llama
from support.runs import train, training_logs
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import blur_trainer as bt
from blur_trainer.evaluation.scoring import token_logps
from blur_trainer.objectives.preference import NPO

pytestmark = needs("bitsandbytes", "quantization")
DATA = examples(6, seed=5), examples(6, seed=6)
LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Wide enough for kernels that work in blocks of 64."""
    folder = tmp_path_factory.mktemp("base")
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_diff_dict() | wide)).save_pretrained(folder)
    return str(folder)


def quantized(compute=torch.float32):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_an_adapter_of_4_bit_weights_trains_and_merges(base, tmp_path, bf16):
    options = {"quantization_config": quantized(torch.bfloat16 if bf16 else torch.float32)}
    config = {"activation_checkpointing": True, "max_steps": 3, "bf16": bf16, "model_init_kwargs": options}
    args = on_device(tmp_path / "out", **config)
    trainer = train(args, *DATA, base, peft_config=LORA, forget_objective=NPO())
    assert trainer.model.get_base_model().is_loaded_in_4bit
    assert {p.device.type for p in trainer.model.parameters()} == {DEVICE.type}
    assert all(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)
    assert all(entry["grad/forget_norm"] > 0 for entry in training_logs(trainer))
    trainer.save_model()
    merged = bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"))
    assert not getattr(merged, "is_quantized", False)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=needs_card("8-bit weights have kernels on GPUs alone"))])
def test_a_model_in_few_bits_is_scored_near_its_own_scores(base, bits):
    config = quantized() if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    few = LlamaForCausalLM.from_pretrained(
        base, quantization_config=config, device_map={"": 0 if CARD else "cpu"}
    ).eval()
    whole = LlamaForCausalLM.from_pretrained(base).to(DEVICE).eval()
    rows = examples(6, seed=3)
    scores = [torch.tensor(sum(float(r.sum()) for r in token_logps(m, rows, pad_token_id=0))) for m in (few, whole)]
    assert scores[0] != scores[1] and abs(scores[0] / scores[1] - 1) < 0.25


@pytest.mark.parametrize("optim", ["adamw_8bit", pytest.param("paged_adamw_8bit", marks=needs_card("paged memory"))])
def test_an_optimizer_of_8_bits_goes_nearly_the_same_way(tmp_path, optim):
    """The moments of small tensors stay in float32: so the embedding is made larger than 4096 elements."""
    model = wide()
    start = on_host(model)
    ends = [
        on_host(train(on_device(tmp_path / name, optim=name, max_steps=3), *DATA, copy.deepcopy(model)).model)
        for name in (optim, "adamw_torch")
    ]
    assert 0 < off(*ends, start) < 0.2


def wide():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_diff_dict() | {"vocab_size": 512, "hidden_size": 32}))
