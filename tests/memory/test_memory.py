"""The estimate: counts against real models, optimizers and graphs; rows by arithmetic; one training measured."""

import os
import re
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import VOCAB, collate, examples, tiny_llama
from support.runs import settings, train
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.optimization import Adafactor

from blur_trainer.memory.estimate import MemoryEstimate, estimate_memory
from blur_trainer.memory.meta import build, load_config, saved_activations
from blur_trainer.memory.reach import reached
from blur_trainer.memory.weights import OPTIMIZERS
from blur_trainer.memory.working import working_bytes
from blur_trainer.models.early_exit import activations
from blur_trainer.models.fused_heads import FUSED_FROM, logits_bytes
from blur_trainer.models.reference import FrozenModel
from blur_trainer.models.truncation import frozen_lower
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.blur import BLURConfig
from blur_trainer.trainers.trainable import choose_trainable

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
CHOSEN = {"train_layers": "1,2", "train_parameters": "down_proj"}
BLUR_RMU = {"forget_objective": "rmu", "retain_objective": "activation_match"}
BLUR_RMU |= {f"{role}_objective_kwargs": {"layer": 2} for role in ("forget", "retain")}


def arguments(**kwargs):
    return BLURConfig("unused", **({"use_cpu": True, "report_to": "none", "max_length": 32} | kwargs))


def estimate(model=None, *, args=None, **kwargs):
    return estimate_memory(tiny_llama() if model is None else model, args or arguments(), **kwargs)


def count(model):
    return sum(p.numel() for p in model.parameters())


def rows(result):
    return result.parameters, result.gradients, result.forget_slot, result.optimizer, result.reference


# ---- counts, against the real thing ----


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_are_the_models_own(tie):
    """AdamW, NPO, all in float32: 4 bytes each for weight, gradient, slot and copy, 8 for the moments."""
    n = count(tiny_llama(tie=tie))
    assert rows(estimate(tiny_llama(tie=tie))) == (4 * n, 4 * n, 4 * n, 8 * n, 4 * n)


class Packed:
    """What a graph has in the place of a tensor that it saves: alive as long as the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


def really_saved(model, run):
    """Bytes that the graph of what `run` answers holds, parameters aside, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    alive = weakref.WeakSet()

    def pack(tensor):
        packed = Packed(tensor)
        alive.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        answer = run()
    storages = [packed.tensor.untyped_storage() for packed in alive]
    assert answer is not None  # until here
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


def gpt_neox():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, gpt_neox])
def test_activations_are_those_of_a_real_pass(make, dtype):
    model = make().to(dtype).train()
    ids = torch.randint(3, VOCAB, (2, 8))
    built = build(model, load_config(model), dtype, None)
    real = really_saved(model, lambda: model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    assert saved_activations(built, 2, 8).total(False) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("make", [lambda: tiny_llama(layers=4), gpt_neox])
@pytest.mark.parametrize("chosen", [{}, {"train_layers": "1"}, CHOSEN], ids=["all", "layer", "matrices"])
def test_activations_of_a_pass_that_ends_at_a_layer(make, chosen):
    """Below the lowest layer that is trained there is no graph, above the objective's neither."""
    model = make().train()
    if isinstance(model, GPTNeoXForCausalLM) and "train_parameters" in chosen:
        chosen = chosen | {"train_parameters": "dense_4h_to_h"}
    objectives = {"forget": RMU(layer=2), "retain": ActivationMatch(layer=2)}
    choose_trainable(model, chosen.get("train_layers"), chosen.get("train_parameters"), objectives)
    batch = {"input_ids": torch.randint(3, VOCAB, (2, 32)), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    saved = saved_activations(build(model, load_config(model), torch.float32, None), 2, 32).up_to(2)
    assert saved.total(False) == pytest.approx(really_saved(model, lambda: activations(model, batch, 2)), rel=0.1)
    assert [bool(inside) for inside in saved.inside] == [not chosen, True, True]


def test_activations_by_layer():
    saved = saved_activations(build(None, tiny_llama(layers=3).config, torch.float32, None), 2, 32)
    assert saved.inputs == (2 * 32 * 16 * 4,) * 3  # (B, T, H) float32
    # the first layer saves the rotary angles that all of them share
    assert saved.inside[0] >= saved.inside[1] == saved.inside[2] > saved.inputs[0]
    assert saved.total(checkpointing=True) == saved.outside + sum(saved.inputs)
    assert saved.up_to(1).total(checkpointing=False) == sum(saved.inside[:2])


def test_checkpointing_keeps_every_layer_up_to_the_objective():
    """transformers lets the embedding's output require a gradient, also of a frozen embedding."""
    model = tiny_llama(layers=4)
    choose_trainable(model, "2", None, {"forget": RMU(layer=2)})
    built = build(model, model.config, torch.float32, None)
    assert [bool(inside) for inside in saved_activations(built, 2, 8).inside] == [False, False, True, True]
    assert all(saved_activations(built, 2, 8, checkpointing=True).inside)
    model.train().activation_checkpointing_enable()
    ids = torch.ones(1, 2, dtype=torch.long)
    assert activations(model, {"input_ids": ids, "attention_mask": ids}, 0).requires_grad


def test_optimizer_states():
    """The functions of the table against the states that real optimizers hold after a step."""
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 30), (30,), (4, 5, 6))]
    real = {
        "adamw_torch": torch.optim.AdamW(parameters),
        "adafactor": Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-3),
        "sgd": torch.optim.SGD(parameters),
    }
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for name, optimizer in real.items():
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        held = sum(4 * t.numel() for t in states if isinstance(t, torch.Tensor) and t.ndim)
        assert sum(OPTIMIZERS[name](p.shape, 4) for p in parameters) == held, name


def test_eight_bit_states():
    """Against bitsandbytes: two bytes per element and two float32 per 256; float32 below 4096 elements."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 256), (63, 65))]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        tensors = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        # the code books are shared by all parameters
        held = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.startswith("qmap"))
        assert OPTIMIZERS["adamw_8bit"](parameter.shape, 4) == held
    assert OPTIMIZERS["paged_adamw_8bit"](parameters[0].shape, 4) == 0


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_train(optim, tmp_path):
    """BLUR's update through 8-bit Adam goes where that of AdamW goes."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "hidden_size": 96, "dtype": None})
    updates = []
    for name in ("adamw_torch", optim):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        before = model.lm_head.weight.detach().clone()
        trainer = train(settings(tmp_path / name, optim=name), examples(4), examples(4, seed=5), model=model)
        updates.append((model.lm_head.weight.detach() - before).flatten())
    assert trainer.optimizer.state[model.lm_head.weight]["state1"].dtype == torch.uint8
    assert torch.cosine_similarity(*updates, dim=0) > 0.99


# ---- rows ----


def test_lora():
    model = get_peft_model(tiny_llama(), LORA)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total, expected = count(model), (4 * trained, 4 * trained, 8 * trained, 0)
    for result in (estimate(peft_config=LORA), estimate(model)):
        assert rows(result) == (4 * total, *expected)


def test_lora_on_bfloat16_and_quantized():
    """PEFT keeps the adapter in float32; bitsandbytes quantizes the layers' linear weights, not embedding and head."""
    model = tiny_llama()
    adapter = sum(p.numel() for p in get_peft_model(tiny_llama(), LORA).parameters() if p.requires_grad)
    linear = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    quantized, rest = sum(w.numel() for w in linear), count(model) - sum(w.numel() for w in linear)
    of = {bits: estimate(peft_config=LORA, dtype="bfloat16", bits=bits).parameters for bits in (None, 4, 8)}
    assert of[None] == 2 * count(model) + 4 * adapter
    assert of[4] == round(2 * rest + quantized * (0.5 + 4 / 64)) + 4 * adapter
    assert of[8] == 2 * rest + quantized + 4 * sum(w.shape[0] for w in linear) + 4 * adapter


def test_a_quantized_model_weighs_what_is_said(tmp_path):
    """bitsandbytes' NF4, the width a multiple of its blocks; the bits are read from the model's configuration."""
    pytest.importorskip("bitsandbytes")
    LlamaForCausalLM(
        LlamaConfig(**{**tiny_llama().config.to_dict(), "hidden_size": 64, "dtype": None})
    ).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, dtype=torch.bfloat16)
    held = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        held += parameter.numel() * parameter.element_size() + (4 * state.absmax.numel() if state is not None else 0)
    estimated = estimate(model, peft_config=LORA).parameters - estimate(model, peft_config=LORA).gradients
    assert estimated == held


def test_frozen_parameters_of_a_model():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    trained = count(model) - model.model.embed_tokens.weight.numel()
    assert estimate(model).gradients == 4 * trained
    assert all(p.device.type == "cpu" for p in model.parameters())  # untouched


@pytest.mark.parametrize(
    ("sharding", "parameters", "gradients", "slot", "optimizer"),
    [
        ("none", 1, 2, 1, 8),  # DDP's buckets
        ("zero0", 1, 1, 1, 12),
        ("zero1", 1, 1, 1 / 8, 12 / 8),  # reduced whole, read in parts
        ("zero2", 1, 1 / 8, 1 / 8, 12 / 8),
        ("zero3", 1 / 8, 2 / 8, 1 / 8, 12 / 8),  # its own partitions stay
        ("fsdp", 1 / 8, 1 / 8, 1 / 8, 8 / 8),
        ("zero2_offload", 1, 0, 0, 0),
        ("zero3_offload", 0, 0, 0, 0),
    ],
)
def test_shares_of_eight_processes(sharding, parameters, gradients, slot, optimizer):
    """In units of the weights' bytes (optimizer: bytes per weight); what is gathered at work comes on top."""
    n = count(tiny_llama())
    result = estimate(world_size=8, sharding=sharding)
    layer = count(tiny_llama().model.layers[0])
    gathered = 4 * (n - 2 * layer + 3 * layer) if parameters < 1 else 0
    assert result.parameters == pytest.approx(4 * n * parameters + gathered, abs=1)
    assert result.gradients == pytest.approx(4 * n * gradients, abs=1)
    assert result.forget_slot == pytest.approx(4 * n * slot, abs=1)
    assert result.optimizer == pytest.approx(n * optimizer, abs=1)


def test_engine_from_arguments():
    args = arguments()
    args.fsdp = True
    assert rows(estimate(args=args, world_size=4)) == rows(estimate(world_size=4, sharding="fsdp"))

    args = arguments()
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    args.hf_deepspeed_config = SimpleNamespace(config=config)
    result, plain = estimate(args=args, world_size=4), estimate(world_size=4, sharding="zero3")
    assert result.optimizer == 0 and result.parameters == plain.parameters


@pytest.mark.parametrize(
    ("kwargs", "lora", "kind"),
    [
        ({}, False, "frozen copy"),
        ({"precompute_ref_logps": True}, False, "precomputed"),
        ({"forget_objective": "grad_ascent"}, False, "none"),
        ({"retain_objective": "kl", "precompute_ref_logps": True}, False, "frozen copy"),
        ({}, True, "adapter off"),
    ],
)
def test_reference_is_the_one_that_the_trainer_chooses(kwargs, lora, kind):
    peft_config = LORA if lora else None
    result = estimate(args=arguments(**kwargs), peft_config=peft_config)
    assert result == estimate(args=arguments(**kwargs), peft_config=peft_config, reference=kind)
    assert (result.reference > 0) is (kind == "frozen copy")


# ---- chosen parameters, passes that end at a layer ----


def chosen_weights(model):
    return [model.model.layers[layer].mlp.down_proj.weight for layer in (1, 2)]


def test_only_chosen_parameters_have_gradients_and_moments():
    """NPO's reference is a copy of the whole model all the same."""
    model = tiny_llama(layers=4)
    n, trained = count(model), sum(p.numel() for p in chosen_weights(model))
    assert rows(estimate(model, args=arguments(**CHOSEN))) == (4 * n, 4 * trained, 4 * trained, 8 * trained, 4 * n)
    result = estimate(model, args=arguments(**CHOSEN), world_size=8, sharding="zero3")
    layer, outside = count(model.model.layers[0]), n - 4 * count(model.model.layers[0])
    largest = chosen_weights(model)[0].numel()  # of a layer, the gradient that is there at a time
    assert result.parameters == pytest.approx(4 * n / 8 + 4 * (outside + 2 * layer + largest), abs=1)


@pytest.mark.parametrize("chosen", [{}, CHOSEN], ids=["all", "matrices"])
def test_a_real_trainer_of_rmu_holds_what_is_estimated(chosen, tmp_path):
    """Of four layers the objectives look at the third: weights, moments, and a reference that shares what it can."""
    args = settings(tmp_path, max_length=32, max_steps=1, **BLUR_RMU, **chosen)
    trainer = train(args, examples(4), examples(4, seed=5), model=tiny_llama(layers=4))
    result = estimate(trainer.model, args=args)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert result.optimizer == sum(4 * t.numel() for t in states if t.ndim)
    own = {id(p) for p in trainer.model.parameters()}
    assert result.reference == sum(4 * p.numel() for p in trainer.reference.model.parameters() if id(p) not in own)
    trained = sum(4 * p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert (result.gradients, result.forget_slot) == (trained, trained)
    assert result == estimate(tiny_llama(layers=4), args=args)


@pytest.mark.parametrize(
    ("processes", "sharding", "share"),
    [(1, "none", True), (8, "none", True), (8, "fsdp", False), (8, "zero2", False), (8, "zero3", False)],
)
def test_the_reference_of_lower_layers(processes, sharding, share):
    model, args = tiny_llama(layers=4), arguments(**BLUR_RMU, **CHOSEN)
    choose_trainable(model, args.train_layers, args.train_parameters, {"retain": ActivationMatch(layer=2)})
    own = {id(p) for p in model.parameters()}
    added = sum(4 * p.numel() for p in frozen_lower(model, 3, share).parameters() if id(p) not in own)
    divided = processes if sharding in ("fsdp", "zero3") else 1
    result = estimate(tiny_llama(layers=4), args=args, world_size=processes, sharding=sharding)
    assert result.reference == added // divided > 0


def test_a_pass_without_a_graph():
    """At its height a Llama layer holds three tensors of its inner width; where little is trained, that counts."""
    config = LlamaConfig(**{**tiny_llama(layers=4).config.to_dict(), "intermediate_size": 4096, "dtype": "float32"})
    working = working_bytes(build(None, config, torch.float32, None), 2, 32)
    assert working == pytest.approx(3 * 4 * 2 * 32 * 4096, rel=0.03)
    one = arguments(**BLUR_RMU, train_layers="2", train_parameters="down_proj", per_device_train_batch_size=2)
    target = 4 * 2 * 32 * config.hidden_size
    assert estimate(config, args=one).activations == working + target
    one.train_layers = "0"
    assert estimate(config, args=one).activations > working + target


def test_adapters_need_no_reference_and_end_at_the_layer():
    result = estimate(tiny_llama(layers=4), args=arguments(**BLUR_RMU), peft_config=LORA)
    model = get_peft_model(tiny_llama(layers=4), LORA)
    lower = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".layers.3." not in name)
    assert (result.gradients, result.reference) == (4 * lower, 0)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("role", ["forget", "retain"])
def test_beside_an_objective_on_answers_rmu_reaches_the_lower_layers_only(role, tie):
    """Its gradient against that of a real backward pass; only DeepSpeed makes zeros of the rest."""
    model, batch = tiny_llama(layers=4, tie=tie), collate(examples(2))
    lower = {"forget": RMU(layer=2), "retain": ActivationMatch(layer=2)}[role]
    reference = FrozenModel(tiny_llama(layers=4, tie=tie, seed=1))
    lower(model, batch, reference).backward()
    real = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    built = build(model, model.config, torch.float32, None)
    assert sum(p.numel() for p in reached(built, lower)) == real < count(model)
    assert sum(p.numel() for p in reached(built, NLL())) == count(model)

    names = {"forget": "npo", "retain": "nll"} | {role: BLUR_RMU[f"{role}_objective"]}
    mixed = {f"{r}_objective": name for r, name in names.items()}
    mixed |= {f"{role}_objective_kwargs": {"layer": 2}}
    result = estimate(model, args=arguments(**mixed))
    n, slot = count(model), real if role == "forget" else count(model)
    # NPO reads a whole reference, RMU none
    assert rows(result) == (4 * n, 4 * n, 4 * slot, 8 * n, 0 if role == "forget" else 4 * n)
    assert estimate(model, args=arguments(**mixed), sharding="zero2").forget_slot == 4 * n


def test_nothing_above_the_layer_costs():
    """Neither further layers nor the vocabulary; beside NLL they do."""

    def activations_of(layers, words, **kwargs):
        config = LlamaConfig(**{**tiny_llama(layers=layers).config.to_dict(), "vocab_size": words})
        return estimate(config, args=arguments(**(BLUR_RMU | kwargs))).activations

    assert activations_of(4, 100) == activations_of(6, 9000)
    assert activations_of(4, 100, activation_checkpointing=True) < activations_of(4, 100)
    nll = {"retain_objective": "nll", "retain_objective_kwargs": None}
    assert activations_of(4, 100) < activations_of(4, 100, **nll) < activations_of(6, 9000, **nll)


def test_autocast_copies_the_weights_of_layers_with_a_graph():
    """Against a model that is stored in bfloat16, and needs no copies."""
    model, args = tiny_llama(layers=4), {**BLUR_RMU, **CHOSEN}
    linear = [m for layer in model.model.layers[1:3] for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    cast = estimate(model, args=arguments(bf16=True, **args), dtype="float32")
    stored = estimate(model, args=arguments(**args), dtype="bfloat16")
    assert cast.activations - stored.activations == 2 * sum(m.weight.numel() for m in linear)


def test_the_longest_topic_counts():
    def activations_of(max_length, *lengths):
        topics = {f"topic {n}": {"max_length": n} for n in lengths} | {"other": {"alpha": 2.0}}
        return estimate(args=arguments(max_length=max_length, topics=topics)).activations

    assert activations_of(32, 16, 48) == activations_of(48)
    assert activations_of(32, 16) == activations_of(32)
    assert activations_of(32, 4096) == activations_of(64)  # positions of the model


@pytest.mark.parametrize("flag", ["offload_forget_gradient", "single_gradient_buffer"])
def test_where_the_forget_slot_goes(flag):
    """A gradient that is larger than the activations, as of real models: else the gradient buffer saves nothing."""
    args = arguments(max_length=2, per_device_train_batch_size=1)
    plain = estimate(args=args)
    setattr(args, flag, True)
    result = estimate(args=args)
    assert result.forget_slot == 0
    assert result.total < plain.total


def test_a_mean_of_retain_gradients_stays_from_step_to_step():
    plain, gru = (estimate(args=arguments(rule=rule)) for rule in ("sum", "gru"))
    assert gru.retain_mean == plain.forget_slot == gru.total - plain.total > 0
    assert "the mean of retain gradients" not in plain.unchecked


def test_a_mask_is_a_byte_per_trained_parameter():
    plain, masked = (estimate(args=arguments(mask_share=share)) for share in (None, 0.1))
    assert masked.mask == plain.forget_slot / 4 == masked.total - plain.total > 0 == plain.mask
    halves = estimate(args=arguments(mask_share=0.1), sharding="zero2", world_size=2)
    assert halves.mask == masked.mask // 2
    assert estimate(args=arguments(mask_share=0.1), sharding="zero2_offload").mask == 0


def test_sam_keeps_the_weights_in_the_forget_slot():
    wide = {"per_device_train_batch_size": 8, "retain_objective": "nll", "forget_objective": "dpo"}  # forget is higher
    plain, sam = (estimate(args=arguments(sam_rho=rho, **wide)) for rho in (None, 0.01))
    assert 0 < sam.total - plain.total <= plain.forget_slot


def test_activations_and_heads():
    """Large vocabulary, deep model: checkpointing, the fused head and short batches each save; KL and DPO cost."""
    config = LlamaConfig(
        vocab_size=50000, hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=2
    )

    def activations(**kwargs):
        kwargs = {"activation_checkpointing": False} | kwargs
        args = arguments(max_length=256, forget_objective="grad_ascent", **kwargs)
        return estimate(config, args=args, device="cuda", reference="none").activations

    plain = activations(fused_lm_head=False)
    logits = 4 * 8 * 256 * 50000
    assert plain > 3 * logits
    fused = activations(fused_lm_head=True)
    assert fused < plain / 2
    assert fused > activations(fused_lm_head=True, activation_checkpointing=True)
    assert activations(retain_objective="kl") > plain
    assert activations(per_device_train_batch_size=4, fused_lm_head=False) == pytest.approx(plain / 2, rel=0.01)
    for two in ("dpo", "flat"):  # graphs, of the answer and of the refusal
        assert estimate(config, args=arguments(max_length=256, forget_objective=two)).activations > plain + logits


@pytest.mark.parametrize("name", ["clamped_entropy", "undial"])
def test_objectives_on_distributions_keep_logits(name):
    """Under a fused head too: logits and gradient, and UNDIAL the reference's logits."""
    config = LlamaConfig(
        vocab_size=50000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )

    def found(objective):
        args = arguments(max_length=256, forget_objective=objective, fused_lm_head=True)
        return estimate(config, args=args, device="cuda", dtype="float32", reference="none")

    logits = logits_bytes(8 * 256, 50000)
    kept = found(name).activations - (logits if name == "undial" else 0)
    assert found("grad_ascent").activations < 2 * logits < kept == found("margin").activations
    assert found(name).unchecked == (f"the memory of `{name}`",) and found("grad_ascent").unchecked == ()


def test_the_head_that_a_gpu_chooses():
    """By default the fused one for large logits. Where it depends on the batch, the worst batch counts."""
    config = LlamaConfig(
        vocab_size=50000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096,
    )  # fmt: skip

    def activations(length, fused=None, **kwargs):
        args = arguments(max_length=length, per_device_train_batch_size=8, forget_objective="grad_ascent")
        args.fused_lm_head = fused
        return estimate(config, args=args, reference="none", **({"device": "cuda"} | kwargs)).activations

    assert logits_bytes(8 * 1024, 50000) < FUSED_FROM < logits_bytes(8 * 2048, 50000)
    assert activations(1024) == activations(1024, False) > activations(1024, True)
    fused, logits = activations(2048, True), activations(2048, False)
    assert fused < 3 * FUSED_FROM < activations(2048) < logits  # shorter batches take logits
    for engine in ("fsdp", "zero1"):  # all batches go one way
        assert activations(2048, sharding=engine) == activations(2048, True, sharding=engine)
    assert activations(2048, device="cpu") == activations(2048, False, device="cpu")


def test_rows_add_up_and_print():
    result = estimate()
    assert isinstance(result, MemoryEstimate) and result.overlap <= 0
    assert result.total == sum(rows(result)) + result.activations + result.overlap
    lines = str(result).splitlines()
    assert [line[:12].strip() for line in lines] == [
        "parameters", "gradients", "forget slot", "optimizer", "reference", "activations", "overlap", "total",
    ]  # fmt: skip
    assert all(line.endswith(" GiB") for line in lines)


def test_the_gradient_is_there_while_accumulating():
    """With one micro-batch the gradient grows while activations go; with two it is there already."""
    once = estimate(args=arguments(max_length=32))
    twice = estimate(args=arguments(max_length=32, gradient_accumulation_steps=2))
    assert twice.total - once.total == min(once.gradients, -once.overlap) and twice.overlap == 0


def test_from_a_path_without_weights(tmp_path):
    config = tiny_llama().config
    config.save_pretrained(tmp_path)
    assert estimate(str(tmp_path)) == estimate(config) == estimate(tiny_llama())
    big = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    assert estimate(big, dtype="bfloat16").parameters == pytest.approx(141e9, rel=0.01)  # of 70 billion


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sharding": "zero4"}, "Unknown sharding 'zero4'; accepted: none, zero0"),
        ({"sharding": "none_offload"}, "Unknown sharding"),
        ({"sharding": "fsdp_offload"}, "zero1 to zero3 also with `_offload`"),  # refused by the backend
        ({"reference": "adapter"}, "Unknown reference 'adapter'; accepted: none, precomputed"),
        ({"dtype": "int8"}, "`dtype` must be a floating point dtype"),
        ({"args": {"optim": "rmsprop"}}, "optim='rmsprop' is not known; accepted: adamw_torch"),
        ({"args": {"train_layers": "2"}}, "has the layers 0 to 1, and no layer 2"),  # as the trainer
    ],
)
def test_errors_say_what_is_accepted(kwargs, message):
    if "args" in kwargs:
        kwargs = kwargs | {"args": arguments(**kwargs["args"])}
    with pytest.raises(ValueError, match=message):
        estimate(**kwargs)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="must be a configuration, a model"):
        estimate(42)


# ---- measured ----


@pytest.mark.full
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_a_real_training_needs_what_is_estimated():
    """One case of benchmarks/memory.py, in a process of its own."""
    import memory

    name = "float32, log-probs precomputed"
    ratio = memory.measure_in_subprocess(name, "cpu") / memory.CASES[name].estimate("cpu").total
    assert memory.LOW <= ratio <= memory.HIGH


@pytest.mark.full
def test_the_page_has_the_table_of_the_command():
    import what_fits

    assert what_fits.table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_page_of_gpus_has_the_numbers_of_the_table():
    """docs/gpu.md says what to set on which card; docs/scaling.md has the table that this comes from."""
    scaling, gpu = ((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("scaling", "gpu"))
    shown = re.findall(r"(\d+\.\d)(?!\*)", gpu.split("## What to set")[1].split("\n\n")[2])
    assert len(shown) >= 9 and set(shown) <= set(re.findall(r" (\d+\.\d): ", scaling))


def test_the_page_prints_what_its_examples_print(tmp_path):
    """docs/scaling.md shows the output of its runnable blocks; docs/wmdp.md has numbers of the second."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python runnable\n(.*?)```\n\n```text\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == 2
    for code, shown in blocks:
        script = tmp_path / "page.py"
        script.write_text(code, encoding="utf-8")
        names = runpy.run_path(str(script))
        estimate = names["estimate"]
        assert str(estimate) == shown
    copied = estimate_memory(names["mistral_7b"], names["args"], sharding="zero2", dtype="bfloat16").reference
    wmdp = " ".join((ROOT / "docs" / "wmdp.md").read_text(encoding="utf-8").split())
    assert f"{estimate.total / 2**30:.1f} GiB in all" in wmdp
    assert f"{estimate.parameters / 2**30:.1f} GiB of weights" in wmdp
    assert f"{estimate.gradients / 2**30:.2f} GiB each" in wmdp
    assert f"{estimate.activations / 2**30:.1f} GiB of activations" in wmdp
    assert f"the copy has {copied / 2**30:.1f} GiB" in wmdp
