"""The plugin for vLLM: how vLLM finds it, and, where there is a vLLM, that its engine says what transformers says.

vLLM wants another transformers than training does, so it has an environment of its own: `BLUR_VLLM_PYTHON` names its
Python. Without it the tests of the engine are skipped; nothing stands in for vLLM.
"""

import ast
import configparser
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from support.processes import ENVIRONMENT
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

import blur_trainer
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.serving.vllm_plugin import ARCHITECTURE, IMPLEMENTATION, register

PACKAGE = Path(blur_trainer.__file__).parent
PYTHON = os.environ.get("BLUR_VLLM_PYTHON")
WORKER = Path(__file__).parents[1] / "support" / "vllm_worker.py"
CUT = {"rank_pattern": {"v_proj": 2}, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
#: the target's class, the composition, the LoRA, what vLLM is told
CASES = {
    "ULD": (LlamaConfig, "uld", {}, {}),
    "offset, tied embeddings": (Qwen2Config, "offset", {}, {}),
    "WHP, three layers": (LlamaConfig, "whp", CUT, {"enable_chunked_prefill": True, "max_num_batched_tokens": 16}),
    "ULD on two processes": (LlamaConfig, "uld", {}, {"tensor_parallel_size": 2}),
}
REFUSED = {
    "load_format='dummy': a logit-difference model": {"load_format": "dummy"},
    "does not support LoRA": {"enable_lora": True},
    "Pipeline parallelism is not supported": {"pipeline_parallel_size": 2},
    "top_logit_filter=2": {"hf_overrides": {"top_logit_filter": 2}},
}
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="BLUR_VLLM_PYTHON names no Python that has vLLM")


def folder_of(tmp_path, kind, composition, lora):
    """A composed model over a target of random weights, with a tokenizer. vLLM has kernels for these sizes."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    size = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, **heads}
    config = kind(**size, initializer_range=0.15, eos_token_id=1, tie_word_embeddings=kind is Qwen2Config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0"))
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    lora = {"target_modules": "all-linear", **lora}
    assistant = lora_assistant(target, 2, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **lora))
    for name, weight in assistant.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model = LogitDifferenceModel(LogitDifferenceConfig(composition=composition), target, assistant)
    model.save_pretrained(tmp_path / "composed")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(tmp_path / "composed")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "composed")


def serve(tmp_path, prompts, **options):
    """Tokens and their log-probabilities over the vocabulary, `(16, V)`, of each prompt; or what vLLM complained."""
    told = {"model": str(tmp_path / "composed"), "prompts": prompts, "options": options}
    (tmp_path / "told.json").write_text(json.dumps(told))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(PYTHON), str(WORKER), str(tmp_path / "told.json"), str(tmp_path / "said.json")]
    environment = ENVIRONMENT | bound | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return done.stdout + done.stderr
    return json.loads((tmp_path / "said.json").read_text())


def test_vllm_is_told_where_the_plugin_is(monkeypatch):
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    name, _, place = setup["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "blur_trainer" and getattr(importlib.import_module(module), function) is register
    told = {}
    registry = types.SimpleNamespace(
        register_model=told.__setitem__
    )  # the one call to vLLM, and what it is called with
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    register()
    register()
    assert told == {ARCHITECTURE: IMPLEMENTATION}
    assert isinstance(AutoConfig.for_model("logit_difference"), LogitDifferenceConfig)


def test_the_registered_name_is_the_one_in_the_folder(tmp_path):
    folder_of(tmp_path, LlamaConfig, "uld", {})
    assert json.loads((tmp_path / "composed" / "config.json").read_text())["architectures"] == [ARCHITECTURE]
    module, _, name = IMPLEMENTATION.partition(":")
    source = (PACKAGE.parent / f"{module.replace('.', '/')}.py").read_text()
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


@needs_vllm
@pytest.mark.parametrize(("kind", "composition", "lora", "options"), CASES.values(), ids=CASES)
def test_the_engine_says_what_transformers_says(kind, composition, lora, options, tmp_path):
    model = folder_of(tmp_path, kind, composition, lora)
    prompts = [torch.randint(2, 128, (length,)).tolist() for length in (5, 17, 40)]
    said = serve(tmp_path, prompts, **options)
    assert not isinstance(said, str), said[-4000:]
    for prompt, (tokens, logps) in zip(prompts, said, strict=True):
        text = torch.tensor([prompt + tokens])
        with torch.no_grad():
            want, plain = (m(text).logits.log_softmax(-1)[0, len(prompt) - 1 : -1] for m in (model, model.target))
        assert want.argmax(-1).tolist() == tokens
        torch.testing.assert_close(torch.tensor(logps), want, rtol=1e-4, atol=1e-3)
        assert (want - plain).abs().max() > 0.5, "the assistant changes nothing here, so nothing was tested"


@needs_vllm
@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=[next(iter(x)) for x in REFUSED.values()])
def test_what_does_not_work_is_refused(message, options, tmp_path):
    folder_of(tmp_path, LlamaConfig, "uld", {})
    said = serve(tmp_path, [[3, 4]], **options)
    assert isinstance(said, str) and message in said, said[-4000:]
