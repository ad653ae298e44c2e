"""LoRA, QLoRA, checkpointing and merging: what PEFT users expect of a trainer."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import tiny_llama
from support.runs import distance, logits, settings, train, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import blur_trainer as bt
from blur_trainer.models.reference import REFERENCE_ADAPTER

FORGET = [{"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, 6, 7, 8, 9]}] * 3
RETAIN = [{"input_ids": [1, 20, 21, 22, 23], "labels": [-100, 20, 21, 22, 23]}] * 3
LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture
def base(tmp_path):
    """A stored model, as a user's path."""
    tiny_llama(0).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing_every_adapter_trains(tmp_path, reentrant):
    """Reentrant checkpoints pass gradients only where an input has one, and frozen embeddings have none."""
    args = settings(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, max_steps=2
    )
    trainer = train(args, FORGET, RETAIN, peft_config=LORA)
    b = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert len(b) == 14  # seven linear layers in each of two blocks
    assert [name for name, p in b.items() if not p.any()] == []


def test_an_adapter_of_4_bit_weights_trains(tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install blur_trainer[quantization]")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = str(tmp_path / "base")
    # 4-bit kernels work in blocks of 32
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_diff_dict() | wide)).save_pretrained(base)
    args = settings(
        tmp_path / "out", gradient_checkpointing=True, max_steps=3, model_init_kwargs={"quantization_config": quantized}
    )
    trainer = train(args, FORGET, RETAIN, model=base, peft_config=LORA)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    assert all(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)
    trainer.save_model()
    merged = bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"))
    assert not getattr(merged, "is_quantized", False)


def test_a_4_bit_model_without_an_adapter_is_refused(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install blur_trainer[quantization]")
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    args = settings(tmp_path / "out", model_init_kwargs={"quantization_config": quantized})
    with pytest.raises(ValueError, match="adapters"):
        bt.BLURTrainer(base, args, FORGET, RETAIN, forget_objective=bt.GradAscent())


# ---- merging ----


def test_the_merged_model_says_what_the_adapted_one_says(base, tmp_path):
    trainer = train(settings(tmp_path / "out"), FORGET, RETAIN, model=base, peft_config=LORA)
    trainer.save_model()
    merged = bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(stored, PeftModel) and distance(weights(merged), weights(stored)) == 0
    assert distance(weights(stored), weights(tiny_llama(0))) > 1e-3
    torch.testing.assert_close(logits(stored), logits(trainer.model), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "merged" / "README.md").read_text() == (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_was_never_stored_is_passed(tmp_path):
    start = tiny_llama(0)
    trainer = train(settings(tmp_path / "out"), FORGET, RETAIN, model=copy.deepcopy(start), peft_config=LORA)
    trainer.save_model()
    with pytest.raises(ValueError, match="`base_model`"):
        bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"))
    merged = bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"), base_model=start)
    torch.testing.assert_close(logits(merged), logits(trainer.model), atol=1e-5, rtol=1e-5)


def test_a_frozen_reference_adapter_is_not_merged(base, tmp_path):
    """A second training on a trained adapter keeps a copy of its start beside it."""
    first = train(settings(tmp_path / "first"), FORGET, RETAIN, model=base, peft_config=LORA)
    second = train(settings(tmp_path / "second"), FORGET, RETAIN, model=first.model)
    second.save_model()
    assert REFERENCE_ADAPTER in second.model.peft_config
    merged = bt.merge_and_save(str(tmp_path / "second"), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(second.model), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged(base, tmp_path):
    with pytest.raises(ValueError, match="holds no adapter"):
        bt.merge_and_save(base, str(tmp_path / "merged"))
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="already holds a run"):
        bt.merge_and_save(str(tmp_path / "adapter"), base)
    with pytest.raises(OSError, match="Cannot load model"):
        bt.merge_and_save(str(tmp_path / "adapter"), str(tmp_path / "merged"), base_model=str(tmp_path / "nowhere"))
    assert not (tmp_path / "merged").exists()


def test_8_bit_adam_steps_as_adam_does(tmp_path):
    """Its moments are rounded to 8 bits from 4096 elements on."""
    pytest.importorskip("bitsandbytes", reason="8-bit Adam needs bitsandbytes: pip install blur_trainer[quantization]")
    exact = train(settings(tmp_path / "a", optim="adamw_torch"), FORGET, RETAIN)
    rounded = train(settings(tmp_path / "b", optim="adamw_8bit"), FORGET, RETAIN)
    assert distance(weights(exact.model), weights(tiny_llama())) > 1e-3
    assert distance(weights(exact.model), weights(rounded.model)) < 1e-3
