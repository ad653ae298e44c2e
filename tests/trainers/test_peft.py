"""LoRA, QLoRA, checkpointing and merging: what PEFT users expect of a trainer."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from support.cases import every
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
    cards = [(tmp_path / name / "README.md").read_text() for name in ("out", "merged")]
    assert ["still knows what was unlearned" in card for card in cards] == [True, False]  # the merged one is no adapter


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


TIED_ENDS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head and others": {"target_modules": ["q_proj", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved embedding, tied anew": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    "neither": {"target_modules": ["q_proj"]},
}


def test_an_adapter_on_a_tied_embedding_or_head(tmp_path):
    """Merged into one weight it would change the other end too, which the adapter does not."""
    tiny_llama(0, tie=True).save_pretrained(tmp_path / "base")

    def check(name, config):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, task_type="CAUSAL_LM", **config)
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        adapted.save_pretrained(tmp_path / name)
        bt.merge_and_save(str(tmp_path / name), str(tmp_path / name / "merged"))
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / name / "merged")
        torch.testing.assert_close(logits(stored), logits(adapted), atol=1e-5, rtol=1e-5)
        assert stored.config.tie_word_embeddings == (name in ("neither", "saved embedding, tied anew"))

    every(((name, config) for name, config in TIED_ENDS.items()), check)


def test_a_model_resized_after_loading_is_passed(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(60, mean_resizing=False)
    start = copy.deepcopy(model)
    trainer = train(settings(tmp_path / "out", max_steps=1), FORGET, RETAIN, model=model, peft_config=LORA)
    trainer.save_model()
    with pytest.raises(ValueError, match=r"does not fit its base.*`base_model`.*resize_token_embeddings") as raised:
        bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"))
    assert "\n" not in str(raised.value)
    merged = bt.merge_and_save(str(tmp_path / "out"), str(tmp_path / "merged"), base_model=start)
    torch.testing.assert_close(logits(merged), logits(trainer.model), atol=1e-5, rtol=1e-5)


def test_what_has_no_weights_to_add(base, tmp_path):
    def check(name, config, words):
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=words) as raised:
            bt.merge_and_save(str(tmp_path / name), str(tmp_path / "merged"))
        assert "\n" not in str(raised.value) and not (tmp_path / "merged").exists()

    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    biased = LoraConfig(target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    cases = [("prompt", prompt, "PROMPT_TUNING.*keep adapter and base"), ("biased", biased, "cannot merge.*lora_bias")]
    every(cases, check)


def test_a_base_that_is_an_adapter_itself(base, tmp_path):
    """An adapter on an adapter: PEFT would load the lower one's base only."""
    lower = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    lower.save_pretrained(tmp_path / "lower")
    lower.save_pretrained(tmp_path / "upper")
    with pytest.raises(ValueError, match=r"is an adapter.*merge_and_save"):
        bt.merge_and_save(str(tmp_path / "upper"), str(tmp_path / "merged"), base_model=str(tmp_path / "lower"))


def test_8_bit_adam_steps_as_adam_does(tmp_path):
    """Its moments are rounded to 8 bits from 4096 elements on."""
    pytest.importorskip("bitsandbytes", reason="8-bit Adam needs bitsandbytes: pip install blur_trainer[quantization]")
    exact = train(settings(tmp_path / "a", optim="adamw_torch"), FORGET, RETAIN)
    rounded = train(settings(tmp_path / "b", optim="adamw_8bit"), FORGET, RETAIN)
    assert distance(weights(exact.model), weights(tiny_llama())) > 1e-3
    assert distance(weights(exact.model), weights(rounded.model)) < 1e-3
