"""What nobody set is chosen by device. The GPU here is a fake: only what asks for it is told that there is one."""

import copy
import json
import logging
import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig
from support.models import examples, tiny_llama
from support.runs import settings
from transformers import AutoModelForCausalLM, TrainingArguments, training_args
from trl import ModelConfig

from blur_trainer import BLURConfig, BLURTrainer, ULDConfig, ULDTrainer, estimate_memory
from blur_trainer.scripts import muse
from blur_trainer.scripts.loading import ModelLoader, under_autocast
from blur_trainer.scripts.methods import changed
from blur_trainer.trainers import precision
from blur_trainer.trainers.precision import default_dtype, settle_checkpointing

LORA = LoraConfig(r=2, target_modules="all-linear")


@pytest.fixture
def gpu(monkeypatch):
    """Settings are chosen as on a GPU with bfloat16; the training itself runs on the CPU, which has autocast too."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda use_cpu: not use_cpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)


@pytest.fixture
def loads_for_gpu(gpu, monkeypatch):
    """Models are loaded as for a GPU."""
    monkeypatch.setattr(precision, "default_dtype", lambda args, frozen: default_dtype(args, frozen, "cuda"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(0).save_pretrained(folder)
    return str(folder)


def chosen(**given):
    args = BLURConfig("out", **given)
    return args.bf16, args.activation_checkpointing


def test_a_gpu_gets_bfloat16_and_checkpointing_and_a_cpu_neither(gpu):
    assert chosen() == (True, True)
    assert chosen(use_cpu=True) == (False, False)


def test_memory_is_pinned_for_a_gpu_only(gpu):
    """torch warns of it on a CPU, where nobody asked for it."""
    assert BLURConfig("out").dataloader_pin_memory and not BLURConfig("out", use_cpu=True).dataloader_pin_memory


@pytest.mark.parametrize(
    "what, given, expected",
    [
        ("an answer", {"bf16": False, "activation_checkpointing": False}, (False, False)),
        ("the old name", {"gradient_checkpointing": False}, (True, False)),
        ("fp16", {"fp16": True}, (False, True)),
        ("FSDP has a switch of its own", {"fsdp": True}, (True, False)),
    ],
)
def test_what_is_set_counts(gpu, what, given, expected):
    assert chosen(**given) == expected


def test_plain_arguments_say_what_their_class_says(gpu):
    taken = BLURConfig.from_training_arguments(TrainingArguments("out"))
    assert (taken.bf16, taken.activation_checkpointing) == (False, False)


@pytest.mark.parametrize(
    "asked, expected",
    [("fp16", False), ("fp8", False), ("bf16", True), ("no", True)],
)
def test_what_was_launched_counts(gpu, monkeypatch, asked, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert chosen()[0] is expected


@pytest.mark.parametrize(
    "what, config, expected",
    [
        ("fp16", {"fp16": {"enabled": True}}, False),
        ("float32", {"bf16": {"enabled": False}}, False),
        ("open", {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}, True),
        ("ZeRO 0 has no bfloat16 here", {"zero_optimization": {"stage": 0}}, False),
        ("ZeRO 0 by silence", {"train_batch_size": 1}, False),
        ("silent", {"zero_optimization": {"stage": 3}}, True),
        ("empty", {}, True),
    ],
)
def test_deepspeed_s_file_counts(gpu, monkeypatch, tmp_path, what, config, expected):
    monkeypatch.setattr(precision, "engine_requested", lambda args, engine: engine == "deepspeed")
    (tmp_path / "ds.json").write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert chosen()[0] is expected


@pytest.mark.parametrize(
    "what, more, given, frozen, trained",
    [
        ("an adapter", {"peft_config": LORA}, {}, {torch.bfloat16}, {torch.float32}),
        ("all weights", {}, {}, set(), {torch.float32}),
        ("named", {}, {"model_init_kwargs": {"dtype": "bfloat16"}}, set(), {torch.bfloat16}),
        ("without autocast", {"peft_config": LORA}, {"bf16": False}, {torch.float32}, {torch.float32}),
    ],
)
def test_trained_weights_load_in_float32_and_frozen_ones_in_bfloat16(
    loads_for_gpu, folder, tmp_path, caplog, what, more, given, frozen, trained
):
    caplog.set_level(logging.INFO, "blur_trainer")
    rows = examples(2)
    trainer = BLURTrainer(folder, settings(tmp_path, use_cpu=False, **given), rows, rows, **more)
    found = {flag: {p.dtype for p in trainer.model.parameters() if p.requires_grad is flag} for flag in (False, True)}
    assert (found[False], found[True]) == (frozen, trained)
    said = [record.message for record in caplog.records if "Precision: " in record.message]
    assert len(said) == 1 and f"trained weights {precision._name(*trained)}" in said[0]
    assert ("bfloat16 (autocast)" in said[0]) is trainer.args.bf16 and "checkpointing on" in said[0]


def test_the_target_of_an_assistant_loads_in_bfloat16_and_learns_in_float32(loads_for_gpu, folder, tmp_path):
    rows = examples(2)
    trainer = ULDTrainer(folder, ULDConfig(tmp_path, max_steps=1, report_to="none"), rows, rows)
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


def test_an_assistant_learns_over_a_bfloat16_target(folder, tmp_path):
    rows = examples(2)
    args = settings(tmp_path, ULDConfig, bf16=True, max_steps=1, model_init_kwargs={"dtype": "bfloat16"})
    trainer = ULDTrainer(folder, args, rows, rows)
    trainer.train()
    assert trainer.unlearned_model()(torch.tensor([[1, 5]])).logits.isfinite().all()


def test_a_reference_by_name_has_the_dtype_of_the_trained_model(loads_for_gpu, folder, monkeypatch, tmp_path):
    asked = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **kw: asked.append(kw["dtype"]) or load(name, **kw)
    )
    monkeypatch.setattr("blur_trainer.trainers.references.is_partitioned", lambda model: True)
    rows = examples(2)
    BLURTrainer(folder, settings(tmp_path, use_cpu=False, forget_objective="npo"), rows, rows)
    assert asked == [torch.float32, torch.float32]


def test_an_architecture_without_checkpointing_goes_without(gpu, caplog):
    args, model = BLURConfig("out"), tiny_llama(0)
    settle_checkpointing(model, args)
    assert args.activation_checkpointing and not caplog.records
    model.supports_gradient_checkpointing = False
    settle_checkpointing(model, args)
    assert (args.activation_checkpointing, args.gradient_checkpointing) == (False, False)
    assert "has no activation checkpointing" in caplog.text
    asked = BLURConfig("out", activation_checkpointing=True)
    settle_checkpointing(model, asked)
    assert asked.activation_checkpointing  # Trainer raises, as the user asked for it


def test_an_estimate_counts_what_a_gpu_would_choose():
    config = tiny_llama(0).config
    left_open, said = BLURConfig("out"), BLURConfig("out", bf16=True, activation_checkpointing=True, use_cpu=True)
    given = {"dtype": "float32", "device": "cuda"}
    assert str(estimate_memory(config, left_open, **given)) == str(estimate_memory(config, said, **given))
    here = estimate_memory(config, left_open, dtype="float32", device="cpu")
    assert here.total != estimate_memory(config, left_open, **given).total
    whole, lora = (estimate_memory(config, left_open, peft_config=peft, device="cuda") for peft in (None, LORA))
    assert lora.parameters - lora.gradients == whole.parameters / 2  # gradients: of the adapter, as large as it is


def test_what_is_loaded_beside_computes_as_the_trained_model_does(folder, tmp_path):
    """Under accelerate's autocast, to the last bit; a copy runs its own weights."""
    args = settings(tmp_path, bf16=True)
    rows = examples(2)
    trainer = BLURTrainer(folder, args, rows, rows)
    trainer.args.learning_rate = 0.0
    trainer.train()
    loaded = ModelLoader(args, ModelConfig(model_name_or_path=folder))(folder)
    ids = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.equal(trainer.model.eval()(ids).logits, logits)
        assert logits.dtype == torch.float32
        assert not torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, logits)
        other = copy.deepcopy(loaded)
        other.lm_head.weight.zero_()
        assert not other(ids).logits.any() and loaded(ids).logits.any()


@pytest.mark.parametrize(
    ("dtype", "more", "said"),
    [
        ("bfloat16", {"learning_rate": 1e-6}, True),
        ("bfloat16", {"learning_rate": 1e-2}, False),
        ("float32", {"learning_rate": 1e-6}, False),
        ("bfloat16", {"learning_rate": 1e-6, "optim": "sgd"}, False),
        ("bfloat16", {"learning_rate": 0.0}, False),
    ],
)
def test_updates_that_rounding_loses_are_announced(tmp_path, caplog, dtype, more, said):
    """The share is that of the weights which one step of Adam leaves as they were."""
    rows = examples(2)
    model = tiny_llama(0).to(getattr(torch, dtype))
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    trainer = BLURTrainer(model, settings(tmp_path, max_steps=1, lr_scheduler_type="constant", **more), rows, rows)
    assert ("is lost" in caplog.text) is said
    if said:
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        share = int(re.search(r"For (\d+)% of them", caplog.text).group(1)) / 100
        assert abs((before == after).double().mean() - share) < 0.02


@pytest.mark.parametrize(("more", "expected"), [(["--use_peft", "True"], "bfloat16"), ([], "float32")])
def test_a_script_leaves_the_dtype_to_the_trainer(loads_for_gpu, folder, tmp_path, more, expected):
    words = ["--model_name_or_path", folder, "--output_dir", str(tmp_path), *more]
    _, args, model_args, _ = muse.parse(words)
    load = ModelLoader(args, model_args)
    assert "dtype" not in load.options and load.options["quantization_config"] is None
    assert load(folder).dtype == getattr(torch, expected)
    assert load(folder, to_train=True).dtype == torch.float32
    _, args, model_args, _ = muse.parse([*words, "--dtype", "float16"])
    assert ModelLoader(args, model_args).options["dtype"] == "float16"
    _, args, model_args, _ = muse.parse([*words, "--load_in_4bit", "True"])
    assert ModelLoader(args, model_args).options["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


def test_a_model_that_hooks_spread_runs_under_autocast_too(tmp_path):
    model = add_hook_to_module(tiny_llama(0), ModelHook())
    assert not hasattr(model.forward, "__func__")
    plain = model(torch.tensor([[1, 5]])).logits
    logits = under_autocast(model, settings(tmp_path, bf16=True))(torch.tensor([[1, 5]])).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, plain)


@pytest.mark.parametrize(
    ("kwargs", "found"),
    [
        (None, True),
        ({"use_reentrant": False}, True),
        ({"every_n_layers": 2}, True),
        ({"use_reentrant": True}, None),
        ({"preserve_rng_state": False}, None),  # given anything, torch's own default counts
    ],
)
def test_ddp_looks_for_unused_parameters_unless_checkpointing_is_reentrant(kwargs, found):
    given = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs, "use_cpu": True}
    assert BLURConfig("out", **given).ddp_find_unused_parameters is found
    assert BLURConfig("out", **given, ddp_find_unused_parameters=False).ddp_find_unused_parameters is False
    assert BLURConfig("out", use_cpu=True).ddp_find_unused_parameters is None


def test_a_script_s_copies_know_what_was_left_to_the_device(gpu):
    args = BLURConfig("out")
    assert changed(args, output_dir="other").by_device == args.by_device == {"bf16", "activation_checkpointing"}
