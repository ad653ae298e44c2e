"""Models given by name: whole causal language models are loaded, everything else is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.cases import every
from support.models import tiny_llama
from support.runs import logits
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from blur_trainer.models.loading import load_pretrained
from blur_trainer.models.suitable import check_causal_lm

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert(**kwargs) -> BertLMHeadModel:
    return BertLMHeadModel(BertConfig(vocab_size=64, **SIZES, **kwargs))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))


def bart() -> BartForConditionalGeneration:
    ends = {f"{end}_{what}": 2 for end in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, max_position_embeddings=64, **ends))


NO_CAUSAL_LM = {
    "T5": (t5, "encoder-decoder"),
    "BART": (bart, "encoder-decoder"),
    "BERT": (bert, "attends to the tokens that it shall predict"),
    "no head": (lambda: tiny_llama().model, "no LM head"),
    "classifier": (lambda: LlamaForSequenceClassification(tiny_llama().config), "no LM head"),
    "as many classes as tokens": (lambda: LlamaForTokenClassification(tiny_llama(num_labels=48).config), "no LM head"),
}


def test_what_is_no_causal_language_model():
    def check(make, why):
        with pytest.raises(ValueError, match=f"`model` .*{why}.*decoder-only causal language model") as raised:
            check_causal_lm(make(), "`model`")
        assert "\n" not in str(raised.value)

    every(NO_CAUSAL_LM, check)


def test_what_is_one():
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, **SIZES))
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    every([tiny_llama(), tiny_llama(tie=True), neox, bert(is_decoder=True), adapted], lambda m: check_causal_lm(m, "x"))


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


BY_NAME = {
    "T5": (t5, "encoder-decoder"),
    "BART, whose decoder alone would load": (bart, "encoder-decoder"),
    "head missing": (lambda: tiny_llama().model, r"no weights for lm_head.weight \(1 tensors.*random"),
    "classifier": (lambda: LlamaForSequenceClassification(tiny_llama().config), "no weights for lm_head.weight"),
    "images": (lambda: ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)), "ViTConfig.*no language model"),
}


def test_by_name_a_part_of_a_model_is_refused(tmp_path):
    """The head would be drawn at random, and unlearning goes on from there."""

    def check(name, make, why):
        folder = saved(make(), tmp_path / name)
        with pytest.raises(ValueError, match=why) as raised:
            load_pretrained(folder, {})
        assert folder in str(raised.value) and "\n" not in str(raised.value)

    every(((name, *case) for name, case in BY_NAME.items()), check)


def test_a_tied_head_is_not_missing(tmp_path):
    """Neither of a whole model nor of a backbone alone: the embedding is the head."""
    every(
        {"whole": (tiny_llama(tie=True), "a"), "backbone": (tiny_llama(tie=True).model, "b")},
        lambda model, name: torch.testing.assert_close(
            logits(load_pretrained(saved(model, tmp_path / name), {})), logits(tiny_llama(tie=True))
        ),
    )


def test_a_missing_tensor_is_named(tmp_path):
    model = tiny_llama()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight \(1 tensors of `LlamaForCausalLM`\)"):
        load_pretrained(str(tmp_path), {})


def test_an_adapter_is_not_a_model(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base")
    folder = saved(
        get_peft_model(load_pretrained(base, {}), LoraConfig(target_modules=["q_proj"])), tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match=r"is an adapter.*merge_and_save.*is_trainable=True") as raised:
        load_pretrained(folder, {})
    assert folder in str(raised.value) and "\n" not in str(raised.value)


def test_damaged_files_are_named(tmp_path):
    folder = Path(saved(tiny_llama(), tmp_path))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="damaged or cut off") as raised:
        load_pretrained(str(folder), {})
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON") as raised:
        load_pretrained(str(folder), {})
    assert "\n" not in str(raised.value)


def test_remote_code_is_refused_and_nobody_is_asked(tmp_path, monkeypatch):
    folder = Path(saved(tiny_llama(), tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ValueError, match="trust_remote_code=True") as raised:
        load_pretrained(str(folder), {})
    assert "\n" not in str(raised.value)
