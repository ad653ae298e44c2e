"""The fused LM head: the same log-probabilities and gradients as from logits, for whom it suits, and only there."""

import copy
import subprocess
import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from support.cases import every
from support.models import VOCAB, collate, examples, tiny_llama
from support.processes import SUPPORT, forked
from support.runs import distance, settings, train, weights
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from trl.trainer import utils as trl_utils

from blur_trainer import Objective
from blur_trainer.models import fused_heads, fused_kernel
from blur_trainer.models.forward import (
    answer_logps,
    causal_lm,
    choose_head,
    forward,
    fused_head_obstacle,
    has_fused_head,
    takes_fused_head,
)
from blur_trainer.models.fused_heads import logits_bytes
from blur_trainer.models.fused_kernel import kernel_obstacle
from blur_trainer.models.logps import sequence_logps
from blur_trainer.models.reference import CurrentModel, FrozenModel, OtherAdapter
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.objectives.losses import grad_ascent_loss
from blur_trainer.objectives.preference import reference_logps
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1))


def gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def gemma2():
    """The soft cap bends logits of this size."""
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config)


def checkpointed():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lora(**kwargs):
    torch.manual_seed(3)
    targets = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return get_peft_model(tiny_llama(), LoraConfig(r=2, **(targets | kwargs)))


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie=True),
    "qwen2": qwen2,
    "gpt_neox": gpt_neox,
    "gemma2": gemma2,
    "checkpointing": checkpointed,
    "lora": lora,
    "half frozen": lambda: freeze_lower(tiny_llama()),
}


def freeze_lower(model):
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def batch(seed=1):
    return collate(examples(4, seed=seed))


def answer(model, inputs):
    """Log-probabilities and the gradient of a function of them that weighs the examples differently."""
    model.zero_grad(set_to_none=True)
    logps = answer_logps(model, inputs)
    (logps * torch.arange(1.0, len(logps) + 1)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def no_logits(model):
    """Raises where the model's own head is called."""

    def refuse(*_):
        raise AssertionError("logits were computed")

    return causal_lm(model).get_output_embeddings().register_forward_pre_hook(refuse)


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_gradients(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    plain, plain_gradients = answer(model, batch())
    choose_head(model, True, CPU)
    with no_logits(model):
        fused, gradients = answer(model, batch())
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    for key, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_bfloat16_within_its_rounding():
    """Both round the logits; against float32 from the same weights, the fused head is no worse than twice the plain."""
    model = tiny_llama().bfloat16()
    exact = answer(tiny_llama().bfloat16().float(), batch())
    plain = answer(model, batch())
    choose_head(model, True, CPU)
    fused = answer(model, batch())

    def error(got):
        gradients = [(got[1][key].float() - value).norm() / value.norm() for key, value in exact[1].items()]
        return torch.stack([(got[0] - exact[0]).norm() / exact[0].norm(), max(gradients)])

    assert fused[0].dtype == torch.float32
    assert (error(fused) <= 2 * error(plain) + 1e-3).all(), (error(fused), error(plain))


OF_LOGPS = sorted(name for name, kind in FORGET_OBJECTIVES.items() if name != "rmu" and not kind.needs_logits)


@pytest.mark.parametrize("name", [*OF_LOGPS, "nll"])
def test_objectives_read_no_logits(name):
    """Every objective of the tables that reads log-probabilities, its reference too."""
    objective = {**FORGET_OBJECTIVES, "nll": NLL}[name]()
    inputs = {**batch(), "refusal": batch(seed=2)}
    inputs["forget_level"] = torch.full((4,), 20.0)
    model, ref_model = tiny_llama(0), tiny_llama(1)
    plain = objective(model, inputs, FrozenModel(ref_model))
    choose_head(model, True, CPU), choose_head(ref_model, True, CPU)
    with no_logits(model), no_logits(ref_model):
        fused = objective(model, inputs, FrozenModel(ref_model))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [CurrentModel, OtherAdapter])
def test_references_through_the_head(kind):
    model = lora()
    plain = reference_logps(batch(), kind(model))
    choose_head(model, True, CPU)
    with no_logits(model):
        fused = reference_logps(batch(), kind(model))
    assert not fused.requires_grad
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_a_batch_without_answers_is_zero_and_has_a_gradient():
    model = tiny_llama()
    choose_head(model, True, CPU)
    inputs = batch() | {"labels": torch.full_like(batch()["labels"], -100)}
    logps = answer_logps(model, inputs)
    logps.sum().backward()
    assert torch.equal(logps, torch.zeros(4))


# ---- where it is used ----


@pytest.fixture
def kernel(monkeypatch):
    """As on a GPU where the kernel runs. Raises what is put into it."""
    errors = []

    def run(device):
        if errors:
            raise errors[0]

    errors_module = types.ModuleType("triton.errors")
    errors_module.TritonError = type("TritonError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.errors", errors_module)
    monkeypatch.setattr(fused_kernel, "is_triton_available", lambda: True)
    monkeypatch.setattr(fused_kernel, "run_kernel", run)
    fused_kernel.kernel_obstacle.cache_clear()
    yield errors
    fused_kernel.kernel_obstacle.cache_clear()


def test_chosen_by_device(kernel):
    """On a CPU it costs time and memory: only where asked."""
    cases = [(None, CPU, False), (True, CPU, True), (False, CUDA, False), (None, CUDA, True)]
    for fused, device, expected in cases:
        model = tiny_llama()
        choose_head(model, fused, device)
        assert has_fused_head(model) is expected
        assert has_fused_head(nn.Sequential(model)) is expected  # any wrapper


def small_batches(monkeypatch, tokens):
    """Batches of this many tokens are large from now on."""
    monkeypatch.setattr(fused_heads, "FUSED_FROM", logits_bytes(tokens, VOCAB))


def test_by_default_batches_with_large_logits_take_it(kernel, monkeypatch):
    inputs = batch()
    count = inputs["input_ids"].numel()
    for least, takes in [(count, True), (count + 1, False)]:
        small_batches(monkeypatch, least)
        model = tiny_llama()
        choose_head(model, None, CUDA)
        assert takes_fused_head(model, inputs) is takes
        with no_logits(model) if takes else nullcontext():
            answer_logps(model, inputs)
    choose_head(model, True, CUDA)
    assert takes_fused_head(model, inputs)


def test_processes_that_share_weights_all_go_one_way(kernel, monkeypatch):
    """An engine that shards gathers the head where it is called: not for some batches only."""
    small_batches(monkeypatch, 100)
    short, long = ({"input_ids": torch.ones(1, length, dtype=torch.long)} for length in (99, 100))
    for largest, by_batch, expected in [
        *((99, True, [False, False]), (100, True, [False, True])),
        *((99, False, [False, False]), (100, False, [True, True])),
    ]:
        model = tiny_llama()
        choose_head(model, None, CUDA, largest, by_batch)
        assert [takes_fused_head(model, inputs) for inputs in (short, long)] == expected
        assert has_fused_head(model) is any(expected)


@pytest.mark.full
def test_under_ddp_each_process_may_go_its_own_way():
    forked(SUPPORT / "mixed_heads_worker.py")


@pytest.mark.parametrize("engine", [None, "fsdp", "deepspeed"])
def test_a_trainer_knows_its_largest_batch(engine, kernel, monkeypatch, tmp_path):
    """Two examples, of 30 tokens at most."""
    args = settings(tmp_path, max_length=30, per_device_train_batch_size=2)
    monkeypatch.setattr(UnlearningConfig, "device", CUDA)
    if engine:
        monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    for least, fused in [(60, True), (61, False)]:
        small_batches(monkeypatch, least)
        model, frozen = tiny_llama(), FrozenModel(tiny_llama())
        setup.choose_heads(args, model, frozen, None)
        assert has_fused_head(model) is has_fused_head(frozen.model) is fused
        assert takes_fused_head(model, {"input_ids": torch.ones(1, 5)}) is (fused and engine is not None)


def test_the_threshold_is_between_what_was_measured():
    """docs/benchmarks.md: 2 x 2048 tokens of 128 256 words are faster through it, 2 x 1024 are not."""
    assert logits_bytes(2 * 1024, 128256) < fused_heads.FUSED_FROM <= logits_bytes(2 * 2048, 128256)


# ---- where its kernel does not run ----

NO_COMPILER = RuntimeError("Failed to find C compiler. Please specify via CC environment variable or ...\nmore")


def test_the_kernel_is_called_as_trl_calls_it():
    """Here in torch's own operations: shapes and arguments are right, both passes run."""
    fused_kernel.run_kernel(CPU)
    assert trl_utils._ChunkedLogProbFunction is fused_kernel.ChunkedLogProbFunction
    assert kernel_obstacle(CPU) is None


@pytest.mark.parametrize(
    "error",
    [
        NO_COMPILER,
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        PermissionError("/root/.triton"),
        AssertionError("libcuda.so cannot found!"),
        "TritonError",
    ],
    ids=lambda error: getattr(type(error), "__name__", error),
)
def test_without_the_kernel_there_are_logits_and_a_word(error, kernel, caplog):
    kernel.append(sys.modules["triton.errors"].TritonError("no ptxas") if error == "TritonError" else error)
    PartialState()  # accelerate's logger speaks on the main process only, and asks which one that is
    model = tiny_llama()
    choose_head(model, None, CUDA)
    assert not has_fused_head(model)
    said = caplog.records[-1].getMessage()
    assert (
        "whole logits" in said and type(kernel[0]).__name__ in said and "gcc python3-dev" in said and "\n" not in said
    )
    answer_logps(model, batch())
    with pytest.raises(
        ValueError, match=r"`fused_lm_head=True`, but its Triton kernel does not run on cuda.*C compiler"
    ):
        choose_head(model, True, CUDA)
    choose_head(model, False, CUDA)  # asks nobody


def test_the_kernel_is_tried_once_and_only_for_whom_it_may_serve(kernel, monkeypatch):
    tried = []
    monkeypatch.setattr(fused_kernel, "run_kernel", tried.append)
    small_batches(monkeypatch, 100)
    choose_head(tiny_llama(), None, CUDA, largest=99)
    choose_head(tiny_llama(), False, CUDA)
    choose_head(BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)), None, CUDA)
    assert tried == []
    choose_head(tiny_llama(), None, CUDA), choose_head(tiny_llama(), True, CUDA)
    assert tried == [CUDA]


def test_without_triton(kernel, monkeypatch):
    monkeypatch.setattr(fused_kernel, "is_triton_available", lambda: False)
    with pytest.raises(ValueError, match=r"Triton.*is not installed: `pip install triton`"):
        choose_head(tiny_llama(), True, CUDA)
    choose_head(tiny_llama(), True, CPU)  # where TRL does not use it


def test_chosen_again():
    """A second trainer on the same model decides anew, and patches once."""
    model = tiny_llama()
    choose_head(model, False, CPU)
    choose_head(model, True, CPU)
    with no_logits(model):
        answer_logps(model, batch())
    patched = model.forward.__func__
    choose_head(model, False, CPU)
    with pytest.raises(AssertionError, match="logits were computed"), no_logits(model):
        answer_logps(model, batch())
    choose_head(model, True, CPU)
    assert has_fused_head(model)
    assert model.forward.__func__ is patched


@pytest.mark.parametrize(
    ("adapter", "what"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "`Linear`"),
        ({"modules_to_save": ["lm_head"]}, "`ModulesToSaveWrapper`"),
    ],
)
def test_an_adapter_on_the_head_is_refused_or_left_out(adapter, what, caplog):
    model = lora(**adapter)
    with pytest.raises(ValueError, match=f"plain `torch.nn.Linear`.*{what}"):
        choose_head(model, True, CPU)
    PartialState()  # accelerate's logger speaks on the main process only, and asks which one that is
    choose_head(model, None, CUDA)
    assert not has_fused_head(model) and "whole logits" in caplog.text
    assert answer_logps(model, batch()).requires_grad


def test_what_does_not_suit():
    class Quantized(nn.Linear):
        pass

    model = tiny_llama()
    model.lm_head = Quantized(16, VOCAB, bias=False)
    assert "Quantized" in fused_head_obstacle(model)
    model.set_output_embeddings(None)
    assert "there is none" in fused_head_obstacle(model)
    composite = tiny_llama()
    composite.base_model_prefix = ""
    assert "no backbone" in fused_head_obstacle(composite)


def test_an_architecture_that_was_not_compared():
    """BERT transforms before the head, RecurrentGemma caps after it, others may do what nobody has looked at."""

    class Own(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    sizes = SIZES | {"num_hidden_layers": 1}
    gemma = RecurrentGemmaConfig(**sizes, lru_width=16, attention_window_size=8, head_dim=8)

    def check(model):
        with pytest.raises(ValueError, match=f"`fused_lm_head=True`.*not compared.*`{type(model).__name__}`"):
            choose_head(model, True, CPU)
        choose_head(model, None, CUDA)
        assert not has_fused_head(model)

    every([BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), RecurrentGemmaForCausalLM(gemma),
           Own(tiny_llama().config)], check)  # fmt: skip


# ---- a model with a fused head is otherwise the model it was ----


def test_other_calls_are_as_before():
    plain, fused = tiny_llama(), tiny_llama()
    choose_head(fused, True, CPU)
    inputs = batch()
    assert torch.equal(forward(fused, inputs), forward(plain, inputs))
    assert torch.equal(fused(**inputs).loss, plain(**inputs).loss)
    prompt = {"input_ids": inputs["input_ids"][:1, :4], "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(fused.generate(**prompt), plain.generate(**prompt))


@pytest.mark.parametrize("fused", [True, False])
def test_a_copy_is_a_model_of_its_own(fused):
    """TRL's function alone would run the first model's weights in the copy."""
    model = tiny_llama()
    choose_head(model, True, CPU)
    copied = copy.deepcopy(model)
    choose_head(copied, fused, CPU)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    expected = copy.deepcopy(tiny_llama())
    expected.load_state_dict(copied.state_dict())
    torch.testing.assert_close(forward(copied, batch()), forward(expected, batch()))
    torch.testing.assert_close(answer_logps(copied, batch()), answer_logps(expected, batch()), rtol=1e-5, atol=1e-5)


# ---- in a trainer ----


@pytest.mark.parametrize("kwargs", [{}, {"precompute_ref_logps": True}, {"gradient_checkpointing": True}])
def test_training_gives_the_same_weights(kwargs, tmp_path):
    data = examples(6, seed=1), examples(6, seed=2)
    runs = {}
    for fused in (False, True):
        args = settings(tmp_path / str(fused), fused_lm_head=fused, gradient_accumulation_steps=2, **kwargs)
        trainer = train(args, *data)
        assert has_fused_head(trainer.model) is fused
        runs[fused] = trainer
    moved = distance(weights(runs[False].model), weights(tiny_llama()))
    assert distance(weights(runs[True].model), weights(runs[False].model)) < 1e-3 * moved


def test_lora_in_a_trainer(tmp_path):
    args = settings(tmp_path, fused_lm_head=True)
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer = train(args, examples(4), examples(4, seed=5), peft_config=peft_config)
    assert all(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)
    with pytest.raises(ValueError, match="no adapter"):
        train(args, examples(4), examples(4), peft_config=LoraConfig(target_modules=["lm_head"], r=2))


def test_kl_beside_it_reads_logits(tmp_path):
    args = settings(tmp_path, fused_lm_head=True, retain_objective="kl", num_train_epochs=1)
    trainer = train(args, examples(4), examples(4, seed=5))
    assert has_fused_head(trainer.reference.model) and trainer.state.log_history[0]["loss/retain"] >= 0


def test_objectives_of_users_work(tmp_path):
    """The one of docs/extending.md, from logits, while the other objective goes without."""

    @dataclass(frozen=True)
    class BoundedAscent(Objective):
        floor: float = -100.0

        def losses(self, model, batch, reference):
            return grad_ascent_loss(sequence_logps(forward(model, batch), batch["labels"])).clamp(min=self.floor)

    train(settings(tmp_path, fused_lm_head=True), examples(4), examples(4), forget_objective=BoundedAscent())


def test_default_is_to_choose():
    assert UnlearningConfig("unused", use_cpu=True).fused_lm_head is None


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("tie", [False, True])
def test_fsdp_gives_every_parameter_back_after_log_probabilities(tie, one_process, monkeypatch):
    """The head's module does not run; before torch 2.13 nothing else finishes the group that accelerate puts it in."""
    monkeypatch.setattr(FSDPState, "_force_complete_incomplete_states", lambda self, output: output, raising=False)
    model, batch = tiny_llama(0, tie=tie), collate(examples(3))
    want = answer_logps(copy.deepcopy(model), batch)
    choose_head(model, True, CPU)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    first = [model.model.norm, *([model.get_input_embeddings()] if tie else [])]
    fully_shard([*first, model.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(answer_logps(model, batch), want)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        assert [name for name, p in model.named_parameters() if not isinstance(p, DTensor)] == []
    answer_logps(model, batch).sum().backward()
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())
