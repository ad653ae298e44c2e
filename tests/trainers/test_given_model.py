"""What is unlearned is the model that was given, it begins as that model, and it is given back as it was."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import (
    C3AConfig,
    FourierFTConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from support.cases import every
from support.models import examples, tiny_llama
from support.runs import distance, logits, settings, train, weights
from support.tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import blur_trainer as bt
from blur_trainer.models.reference import REFERENCE_ADAPTER
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN = examples(4), examples(4, 1)


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM"} | kwargs))


def taught(model: nn.Module) -> nn.Module:
    """An adapter that has learnt something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def start(tmp_path):
    def make(model=None, **kwargs):
        config = {key: kwargs.pop(key) for key in ("train_layers", "max_steps") if key in kwargs}
        model = tiny_llama() if model is None else model
        return BLURTrainer(model, settings(tmp_path / "run", **config), FORGET, RETAIN, **kwargs)

    return make


def refused(words: str, action) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        action()
    assert "\n" not in str(raised.value)


# ---- a target that is an adapter ----


@pytest.fixture
def target(tmp_path):
    """Folders of a base and of an adapter that was trained on it; what both say together."""
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = taught(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora()))
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), logits(adapted)


def test_the_advice_for_an_adapter_leads_to_the_target(start, target, tmp_path):
    """By name with or without a new adapter, and loaded: one line, whose call works."""
    folder, said = target
    for kwargs in ({}, {"peft_config": lora()}):
        refused(re.escape(f"merge_and_save({folder!r}, 'merged')"), lambda kw=kwargs: start(folder, **kw))
    injected = AutoModelForCausalLM.from_pretrained(folder)
    refused("has an adapter already.*merge_and_save", lambda: start(injected, peft_config=lora()))
    refused("nothing would be trained.*is_trainable=True.*merge_and_save", lambda: start(injected))
    loaded = PeftModel.from_pretrained(tiny_llama(), folder)
    refused("`PeftModel` and a `peft_config`.*merge_and_save", lambda: start(loaded, peft_config=lora()))
    merged = str(tmp_path / "merged")
    bt.merge_and_save(folder, merged)
    trainer = start(merged, peft_config=lora())
    torch.testing.assert_close(logits(trainer.model), said, atol=1e-5, rtol=1e-5)
    again = start(PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True))
    torch.testing.assert_close(logits(again.model), said)


def test_nothing_to_train_without_an_adapter_leads_to_one(start):
    refused("Unfreeze parameters, or pass `peft_config`", lambda: start(tiny_llama().requires_grad_(False)))


def test_an_adapter_injected_by_transformers_trains_from_where_it_is(start):
    model = tiny_llama()
    model.add_adapter(lora())
    taught(model)
    said = logits(model)
    trainer = start(model, max_steps=1)
    assert torch.equal(trainer.reference.logits({"input_ids": probe(), "attention_mask": probe() * 0 + 1}), said)
    trainer.train()
    assert not torch.equal(logits(model), said)


def probe():
    return torch.tensor([[1, 5, 9, 13, 17, 21], [1, 4, 40, 41, 42, 2]])


STATES = {
    "two active": (lambda m: m.base_model.set_adapter(["default", "other"]), "exactly one"),
    "merged": (lambda m: m.merge_adapter(), "unmerge_adapter"),
    "switched off": (lambda m: m.disable_adapter_layers(), "enable_adapter_layers"),
}


def test_an_adapter_that_would_not_train(start):
    def check(change, words):
        model = taught(get_peft_model(tiny_llama(), lora()))
        model.add_adapter("other", lora())
        change(model)
        refused(words, lambda: start(model))

    every(STATES, check)


def test_an_adapter_of_any_name_beside_or_as_the_trained_one(start):
    beside = taught(get_peft_model(tiny_llama(), lora(), adapter_name="policy"))
    beside.add_adapter("reference", lora(r=4))
    beside.set_adapter("policy")
    own = weights(beside)
    trained = taught(get_peft_model(tiny_llama(), lora(r=4), adapter_name="reference"))
    for model in (beside, trained):
        said = logits(model)
        trainer = start(model, max_steps=1)
        trainer.train()
        batch = {"input_ids": probe(), "attention_mask": torch.ones_like(probe())}
        assert torch.equal(trainer.reference.logits(batch), said)
        assert not torch.equal(logits(model), said)
    now = weights(beside)
    assert all(torch.equal(now[name], value) for name, value in own.items() if ".reference." in name)
    ours = get_peft_model(tiny_llama(), lora(), adapter_name=REFERENCE_ADAPTER)
    refused(f"{REFERENCE_ADAPTER!r}.*another name", lambda: start(ours))


# ---- a new adapter begins as the model that was given ----


CHANGES_AT_RANDOM = {
    "prompt tuning": (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PromptTuningConfig"),
    "P-tuning": (PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PromptEncoderConfig"),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PrefixTuningConfig"),
    "random LoRA": (lora(init_lora_weights=False), "init_lora_weights=False.*'gaussian'"),
    "random SVD": (lora(init_lora_weights="pissa_niter_4"), "pissa_niter_4.*'pissa'"),
    "CorDA": (lora(init_lora_weights="corda"), "corda"),
    "FourierFT": (FourierFTConfig(n_frequency=10, target_modules=["q_proj"]), "FourierFTConfig.*at random"),
    "C3A": (C3AConfig(block_size=4, target_modules=["q_proj"]), "C3AConfig.*at random"),
}


def test_methods_that_change_the_model_before_it_is_trained(start):
    model = tiny_llama()
    before, names = logits(model), [name for name, _ in model.named_modules()]

    def check(config, words):
        refused(words, lambda: start(model, peft_config=config))
        assert torch.equal(logits(model), before) and [name for name, _ in model.named_modules()] == names
        assert all(p.requires_grad for p in model.parameters())

    every(CHANGES_AT_RANDOM, check)


def test_methods_that_do_not(start):
    def check(config):
        torch.testing.assert_close(logits(start(peft_config=config).model), logits(tiny_llama()), atol=1e-4, rtol=1e-4)

    inits = [lora(init_lora_weights=init) for init in (True, "gaussian", "orthogonal", "pissa", "olora")]
    ia3 = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    every([*inits, lora(use_dora=True), lora(bias="all"), lora(modules_to_save=["lm_head"]), ia3], check)


def test_a_start_that_is_taken_off_the_weights(tmp_path):
    """Reference, saved adapter and merged model belong to the same base: PEFT makes the start again, once."""
    tiny_llama().save_pretrained(tmp_path / "base")
    args = settings(tmp_path / "run", max_steps=1, learning_rate=1e-2)
    config = lora(init_lora_weights="pissa")
    trainer = train(args, FORGET, RETAIN, model=str(tmp_path / "base"), peft_config=config)
    batch = {"input_ids": probe(), "attention_mask": torch.ones_like(probe())}
    torch.testing.assert_close(trainer.reference.logits(batch), logits(tiny_llama()), atol=1e-4, rtol=1e-4)
    said = logits(trainer.model)
    assert (said - logits(tiny_llama())).abs().max() > 1e-2
    trainer.save_model()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "run")), said)
    merged = bt.merge_and_save(str(tmp_path / "run"), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), said, atol=1e-4, rtol=1e-4)


# ---- what is trained ----


def test_float16_weights_are_not_trained(start):
    refused("float16.*bfloat16 or float32", lambda: start(tiny_llama().half()))
    adapted = start(tiny_llama().half(), peft_config=lora())  # PEFT makes the adapter float32
    assert {p.dtype for p in adapted.model.parameters() if p.requires_grad} == {torch.float32}
    start(tiny_llama().bfloat16())


def test_an_optimizer_that_leaves_trained_parameters_out(start):
    model = tiny_llama()
    whole = torch.optim.SGD(model.parameters(), lr=0.1)
    action = lambda: start(model, peft_config=lora(), optimizers=(whole, None))  # noqa: E731
    refused("`optimizers`.*none of 8 trainable parameters.*lora_A", action)
    part = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    refused("`optimizers`.*none of 20 trainable", lambda: start(model, optimizers=(part, None)))
    start(model, optimizers=(whole, None))
    start(model, optimizers=(whole, None), train_layers="1")  # it may hold frozen ones
    adapted = get_peft_model(model, lora())
    own = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    trainer = start(adapted, optimizers=(own, None), max_steps=1)
    before = weights(adapted)
    trainer.train()
    assert distance(weights(adapted), {**weights(adapted), **before}) > 0


def test_a_reference_that_shares_trained_parameters(start):
    model, other = tiny_llama(), tiny_llama(1)
    other.model.embed_tokens = model.model.embed_tokens
    refused("`ref_model`.*shares trained parameters", lambda: start(model, ref_model=other))


def test_a_reference_that_is_no_causal_model(start):
    refused("`ref_model`.*no LM head", lambda: start(ref_model=tiny_llama().model))


# ---- given back ----


def test_after_a_failed_construction_the_model_is_as_it_was(start, tmp_path):
    """In a notebook one corrects the argument and calls again, with the same model."""
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before, flags = logits(model), {name: p.requires_grad for name, p in model.named_parameters()}

    def fails(**kwargs):
        rows = kwargs.pop("forget", [{"wrong": "column"}])
        with pytest.raises(ValueError, match=r"wrong|no layer"):
            BLURTrainer(model, settings(tmp_path / "x", **kwargs.pop("config", {})), rows, RETAIN, **kwargs)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    fails(config={"train_layers": "1"})
    fails(peft_config=lora())
    fails(peft_config=lora(), forget=FORGET, config={"train_layers": "7"})
    assert torch.equal(logits(model), before)
    fails(peft_config=lora(init_lora_weights="pissa"))
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(start(model, peft_config=lora()).model), before, atol=1e-4, rtol=1e-4)


def test_after_training_the_model_is_as_trainable_as_before(start):
    """What `train_layers` froze is frozen while the model trains, in every `train`, and for nobody after that."""
    model, reference = tiny_llama(), tiny_llama(1)
    model.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = start(model, train_layers="1", ref_model=reference, max_steps=1)
    assert 0 < sum(p.requires_grad for p in model.parameters()) == 9
    for _ in range(2):
        before = weights(model)
        trainer.train()
        moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert moved and all(".layers.1." in name for name in moved)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.requires_grad for p in reference.parameters()) and reference.training


# ---- its tokenizer ----


def with_tokenizer(folder: Path) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=1)).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_broken_tokenizer_is_not_an_absent_one(start, tmp_path):
    name = with_tokenizer(tmp_path / "model")
    assert len(start(name).processing_class) > 100
    whole = (tmp_path / "model" / "tokenizer.json").read_text()
    (tmp_path / "model" / "tokenizer.json").write_text(whole[:500])
    refused("tokenizer.json.*is no JSON.*`processing_class`", lambda: start(name))
    (tmp_path / "model" / "tokenizer.json").write_text(whole)
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["a.B", None]},
                                                                   "tokenizer_class": "B"}))  # fmt: skip
    refused("tokenizer beside the model.*trust_remote_code=True.*`processing_class`", lambda: start(name))
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    assert start(name).processing_class is None
