"""What the reference model is, that it stays what it is, and that the cheap ways to have one are the exact ones."""

import gc
import math
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from support.cases import every
from support.models import collate, examples, tiny_llama
from support.runs import distance, logits, probe, settings, train, training_logs, weights
from support.tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from blur_trainer.models.forward import forward
from blur_trainer.models.reference import (
    REFERENCE_ADAPTER,
    CurrentModel,
    FrozenModel,
    OtherAdapter,
    adapter_is_identity,
    adapter_reference,
    evaluating,
    trains_beside_adapter,
)
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import DPO, NPO, reference_logps
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN = examples(6), examples(5, 1)
LORA = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2, lora_dropout=0.2)


def fresh_lora(**kwargs) -> PeftModel:
    return get_peft_model(tiny_llama(**kwargs), LORA)


def trained_lora(seed: int = 3) -> PeftModel:
    """An adapter that already says something, as after TRL's SFT."""
    model = fresh_lora()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def batch() -> dict[str, Tensor]:
    return {"input_ids": probe(), "attention_mask": torch.ones_like(probe()), "labels": probe()}


def literal_logps(model: nn.Module, rows: list[dict[str, list[int]]]) -> list[float]:
    """`log p(answer | prompt)`, one row and one token at a time."""
    answers = []
    model.eval()
    for row in rows:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        total = 0.0
        for position, label in enumerate(row["labels"]):
            if position and label != -100:
                total += torch.log_softmax(scores[position - 1], -1)[label].item()
        answers.append(total)
    return answers


# ---- the three kinds ----


def test_frozen_copy_is_equal_and_apart():
    model = tiny_llama(dropout=0.5).train()
    frozen = FrozenModel.copy_of(model)
    assert torch.equal(frozen.logits(batch()), logits(model))
    theirs = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in theirs for parameter in frozen.model.parameters())
    assert all(not parameter.requires_grad for parameter in frozen.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    before = frozen.logits(batch())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(frozen.logits(batch()), before)


def test_frozen_copy_keeps_tied_embeddings_tied():
    model = tiny_llama(tie=True)
    copied = FrozenModel.copy_of(model).model
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not model.lm_head.weight


@pytest.mark.parametrize("kind", ["frozen", "adapter off", "other adapter", "current"])
def test_references_have_no_gradient_no_dropout_and_leave_the_mode(kind):
    model = trained_lora() if "adapter" in kind else tiny_llama(dropout=0.5)
    if kind == "other adapter":
        reference = adapter_reference(model)
    else:
        makers = {"frozen": FrozenModel.copy_of, "adapter off": OtherAdapter, "current": CurrentModel}
        reference = makers[kind](model)
    for training in (True, False):
        model.train(training)
        first, second = reference.logits(batch()), reference.logits(batch())
        assert not first.requires_grad and first.grad_fn is None
        assert torch.equal(first, second)
        assert model.training is training
        assert all(module.training is training for module in model.modules())


def test_mode_is_restored_after_an_error():
    model = tiny_llama().train()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not model.training
        raise RuntimeError("inside")
    assert model.training


def test_adapter_off_is_the_base_model():
    model = trained_lora()
    assert torch.equal(OtherAdapter(model, None).logits(batch()), logits(tiny_llama()))
    assert not torch.equal(logits(model), logits(tiny_llama()))  # and it is on again
    assert model.active_adapter == "default"


def test_a_reference_forward_between_forward_and_backward_changes_no_gradient():
    """KL's order: the reference first. But a graph that is alive must survive a switched adapter as well."""
    model = trained_lora().eval()
    reference = adapter_reference(model)

    def gradient(between: bool) -> list[Tensor]:
        model.zero_grad()
        loss = forward(model, batch()).square().mean()
        if between:
            reference.logits(batch())
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, disturbed = gradient(False), gradient(True)
    assert len(plain) == len(disturbed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, disturbed, strict=True))


# ---- which reference an adapter gets ----


def test_a_fresh_adapter_is_switched_off():
    model = fresh_lora()
    assert adapter_is_identity(model)
    reference = adapter_reference(model)
    assert reference.adapter is None
    assert list(model.peft_config) == ["default"]


def test_a_trained_adapter_gets_a_frozen_copy():
    model = trained_lora()
    before = logits(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not adapter_is_identity(model)
    reference = adapter_reference(model)
    assert reference.adapter == REFERENCE_ADAPTER
    assert torch.equal(reference.logits(batch()), before)
    assert torch.equal(logits(model), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert model.active_adapter == "default"


def test_reference_logits_leave_trainable_flags_alone():
    """`set_adapter` switches requires_grad on for the adapter that it activates."""
    model = trained_lora()
    reference = adapter_reference(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for _ in range(2):
        reference.logits(batch())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("kind", ["embeddings", "modules_to_save"])
def test_an_adapter_trained_on_embeddings_is_no_identity(kind):
    """Only rows of tokens that occurred have moved: a probe that looks at two ids sees nothing."""
    if kind == "embeddings":
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["embed_tokens"], r=2))
        (table,) = [p for name, p in model.named_parameters() if "lora_embedding_A" in name]
        table.data[:, 5:] = 0.7
    else:
        model = get_peft_model(
            tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["embed_tokens"])
        )
        (table,) = [p for name, p in model.named_parameters() if "modules_to_save" in name]
        table.data[5:] += 0.7
    before = logits(model)
    assert not torch.equal(before, logits(tiny_llama()))
    assert not adapter_is_identity(model)
    assert torch.allclose(adapter_reference(model).logits(batch()), before)


def test_an_adapter_with_another_name_gets_a_copy_too():
    model = get_peft_model(tiny_llama(), LORA, adapter_name="sft")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    before = logits(model)
    reference = adapter_reference(model)
    assert torch.equal(reference.logits(batch()), before)
    assert model.active_adapter == "sft"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and ".sft." in name:
                parameter.add_(1.0)
    assert torch.equal(reference.logits(batch()), before)


def test_saved_modules_of_the_adapter_are_copied_too():
    """`modules_to_save` (a trained head, say) belongs to the adapter, and so to its reference."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "lora_B" in name:
            parameter.data.add_(0.3)
    before = logits(model)
    reference = adapter_reference(model)
    assert torch.allclose(reference.logits(batch()), before)
    assert torch.allclose(logits(model), before)


def test_a_second_trainer_freezes_the_adapter_anew(tmp_path):
    """Unlearn one set, then another one (`--sequence`): the second reference is the model after the first."""
    first = train(settings(tmp_path / "a"), FORGET, RETAIN, model=trained_lora())
    between = logits(first.model)
    second = BLURTrainer(first.model, settings(tmp_path / "b"), FORGET, RETAIN)
    assert torch.allclose(second.reference.logits(batch()), between)


def test_weights_beside_the_adapter_make_the_reference_a_copy():
    """Switching an adapter off undoes neither trained biases nor norms, layers or embeddings that were unfrozen."""

    def check(change):
        model = get_peft_model(with_biases(), LoraConfig(target_modules=["q_proj"], r=2, **change.get("lora", {})))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or change.get("unfreeze", "nothing") in name)
        before, reference = logits(model), adapter_reference(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
        assert torch.equal(reference.logits(batch()), before)
        assert not torch.equal(logits(model), before)
        assert isinstance(reference, FrozenModel) == bool(trains_beside_adapter(model)) == change["copy"]

    every(
        {
            "all biases": {"lora": {"bias": "all"}, "copy": True},
            "its biases": {"lora": {"bias": "lora_only"}, "copy": True},
            "norms": {"unfreeze": "norm", "copy": True},
            "a layer": {"unfreeze": "layers.1.mlp", "copy": True},
            "head": {"lora": {"modules_to_save": ["lm_head"]}, "copy": False},
            "tokens": {"lora": {"trainable_token_indices": [5]}, "copy": False},
            "DoRA": {"lora": {"use_dora": True}, "copy": False},
        },
        check,
    )


def with_biases() -> LlamaForCausalLM:
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.1)
    return model


def test_another_trained_method_than_lora_is_copied_as_it_is():
    """SHiRA draws its indices: a copy that draws others would be another model."""
    model = get_peft_model(tiny_llama(), ShiraConfig(r=2, target_modules=["q_proj"], random_seed=None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira" in name:
                parameter.add_(0.5)
    before = logits(model)
    assert torch.equal(adapter_reference(model).logits(batch()), before)
    assert torch.equal(logits(model), before)


# ---- the precision of the trained model ----


@pytest.mark.parametrize(
    "kind", ["a copy", "lower layers", "given", "adapter off", "copied adapter", "copied model", "precomputed"]
)
def test_before_the_first_step_the_reference_says_what_the_model_says(tmp_path, kind):
    """Under bf16 one of both in float32 would be noise, which BLUR-RMU's alpha multiplies by 800."""
    loras = {"adapter off": fresh_lora, "copied adapter": trained_lora}
    biased = lambda: get_peft_model(with_biases(), LoraConfig(target_modules=["q_proj"], r=2, bias="all"))  # noqa: E731
    model = no_dropout(loras.get(kind, biased if kind == "copied model" else tiny_llama)())
    config = {"max_steps": 1, "bf16": True, "retain_objective": "kl", "precompute_ref_logps": kind == "precomputed"}
    if kind == "lower layers":
        layer = {"layer": 0}
        config |= {"forget_objective": "rmu", "forget_objective_kwargs": layer, "retain_objective_kwargs": layer}
        config |= {"retain_objective": "activation_match"}
    given = {"ref_model": tiny_llama()} if kind == "given" else {}
    (log,) = training_logs(train(settings(tmp_path, **config), FORGET, RETAIN, model=model, **given))
    assert log["loss/retain"] == 0 and log["grad/retain_norm"] < 1e-6
    if kind != "lower layers":
        assert log["loss/forget"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-6)


# ---- during training ----


@pytest.mark.parametrize("objectives", [{}, {"retain_objective": KL()}], ids=["NPO", "NPO and KL"])
@pytest.mark.parametrize(
    "model", [tiny_llama, fresh_lora, trained_lora], ids=["full", "fresh adapter", "trained adapter"]
)
def test_the_reference_stays_what_it_was(tmp_path, model, objectives):
    trainer = BLURTrainer(model(), settings(tmp_path / "run"), FORGET, RETAIN, **objectives)
    initial, flags = logits(trainer.model), {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    assert torch.equal(trainer.reference.logits(batch()), initial)
    trainer.train()
    assert torch.equal(trainer.reference.logits(batch()), initial)
    assert not torch.allclose(logits(trainer.model), initial)
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == flags
    if isinstance(trainer.reference, FrozenModel):
        assert all(p.grad is None and not p.requires_grad for p in trainer.reference.model.parameters())
        assert not trainer.reference.model.training


@pytest.mark.parametrize("model", [fresh_lora, trained_lora])
def test_base_weights_and_reference_adapter_do_not_move(tmp_path, model):
    trainer = BLURTrainer(model(), settings(tmp_path / "run", weight_decay=0.5), FORGET, RETAIN)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if "lora_" in name and ".default." in name}
    assert moved == expected


def test_the_reference_can_be_passed(tmp_path):
    """KL to another model pulls towards it: the first gradient is that model's, written out."""
    other = tiny_llama(seed=5)
    trainer = BLURTrainer(
        tiny_llama(), settings(tmp_path / "run", max_steps=1), FORGET, RETAIN, ref_model=other, retain_objective=KL()
    )
    assert torch.equal(trainer.reference.logits(batch()), logits(tiny_llama(seed=5)))
    trainer.train()
    assert training_logs(trainer)[0]["loss/retain"] > 0.1  # 0 were the reference the model itself
    itself = train(settings(tmp_path / "b", max_steps=1), FORGET, RETAIN, retain_objective=KL())
    assert training_logs(itself)[0]["loss/retain"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("needed", [(NPO(), NLL()), (GradAscent(), KL()), (GradAscent(), NLL())])
def test_a_reference_is_made_only_where_something_reads_it(tmp_path, needed):
    forget, retain = needed
    trainer = BLURTrainer(
        tiny_llama(), settings(tmp_path / "run"), FORGET, RETAIN, forget_objective=forget, retain_objective=retain
    )
    assert (trainer.reference is None) == (needed == (GradAscent(), NLL()))


# ---- precomputed log-probabilities ----


@pytest.mark.parametrize(
    "model", [tiny_llama, fresh_lora, trained_lora], ids=["full", "fresh adapter", "trained adapter"]
)
@pytest.mark.parametrize("config", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulation"])
def test_npo_with_precomputed_logps_equals_the_live_reference(tmp_path, model, config):
    config = config | {"num_train_epochs": 3, "learning_rate": 1e-2}
    live = train(settings(tmp_path / "live", **config), FORGET, RETAIN, model=no_dropout(model()))
    cached = train(
        settings(tmp_path / "cached", precompute_ref_logps=True, **config), FORGET, RETAIN, model=no_dropout(model())
    )
    final = weights(cached.model)
    live_weights = {name: value for name, value in weights(live.model).items() if name in final}
    assert cached.reference is None
    assert distance(live_weights, final) <= 1e-5
    assert distance(final, weights(no_dropout(model()))) > 1e-2
    for a, b in zip(training_logs(live), training_logs(cached), strict=True):
        assert a["loss/forget"] == pytest.approx(b["loss/forget"], rel=1e-5)


def no_dropout(model: nn.Module) -> nn.Module:
    """Computing log-probabilities draws from the generator that dropout draws from: without it, runs compare."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def qa_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


QUESTIONS = [
    {"question": f"Who painted mural {i}?", "answer": f"Mara Velin, in {i} weeks" + "!" * (i % 3)} for i in range(5)
]


def test_dpo_with_precomputed_logps_equals_the_live_reference(tmp_path):
    kwargs = {"processing_class": tiny_tokenizer(), "forget_objective": DPO(beta=0.5)}
    # not Adam: where a gradient is rounding noise, its sign decides about a whole step
    config = {"num_train_epochs": 3, "learning_rate": 5e-2, "optim": "sgd"}
    live = train(settings(tmp_path / "live", **config), QUESTIONS, QUESTIONS, model=qa_model(), **kwargs)
    cached = train(
        settings(tmp_path / "cached", precompute_ref_logps=True, **config),
        QUESTIONS,
        QUESTIONS,
        model=qa_model(),
        **kwargs,
    )
    assert cached.reference is None
    assert {"ref_logps", "refusal_ref_logps"} <= set(cached.train_dataset.forget.column_names)
    assert distance(weights(live.model), weights(cached.model)) <= 1e-5
    assert distance(weights(qa_model()), weights(cached.model)) > 1e-2


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_columns_are_the_literal_log_probabilities(tmp_path, batch_size):
    args = settings(tmp_path, precompute_ref_logps=True, max_steps=1, per_device_train_batch_size=batch_size)
    trainer = train(args, FORGET, RETAIN, model=tiny_llama(dropout=0.5))
    found = trainer.train_dataset.forget["ref_logps"]
    assert list(found) == pytest.approx(literal_logps(tiny_llama(), FORGET), rel=1e-5)
    assert trainer.train_dataset.retain.column_names == ["input_ids", "labels"]


def test_columns_of_a_given_ref_model(tmp_path):
    args = settings(tmp_path, precompute_ref_logps=True, max_steps=1)
    trainer = train(args, FORGET, RETAIN, ref_model=tiny_llama(seed=9))
    expected = literal_logps(tiny_llama(seed=9), FORGET)
    assert list(trainer.train_dataset.forget["ref_logps"]) == pytest.approx(expected, rel=1e-5)
    assert trainer.reference is None


def test_given_columns_are_used_as_they_are(tmp_path):
    """`ref_logps` in the dataset: whoever computed them elsewhere needs neither a pass nor a model here."""
    rows = [row | {"ref_logps": -3.0 - index} for index, row in enumerate(FORGET)]
    args = settings(tmp_path, precompute_ref_logps=True, max_steps=3, per_device_train_batch_size=6, num_train_epochs=1)
    trainer = train(args, rows, RETAIN, forget_objective=NPO(beta=0.2))
    assert list(trainer.train_dataset.forget["ref_logps"]) == [-3.0 - index for index in range(6)]
    logps = torch.tensor(literal_logps(tiny_llama(), FORGET))
    expected = -(2 / 0.2) * torch.log(torch.sigmoid(-0.2 * (logps - torch.tensor([-3.0 - i for i in range(6)])))).mean()
    assert training_logs(trainer)[0]["loss/forget"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_reference_is_in_memory(tmp_path):
    """Neither made nor kept: the `ref_model` that was passed can go once its numbers are there."""
    passed = tiny_llama(seed=9)
    trainer = BLURTrainer(
        tiny_llama(), settings(tmp_path, precompute_ref_logps=True, max_steps=1), FORGET, RETAIN, ref_model=passed
    )
    assert trainer.reference is None
    trainer.train()
    alive = weakref.ref(passed)
    del passed
    gc.collect()
    gone = alive() is None
    assert gone, "the trainer still holds the reference model"


@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
def test_precompute_beside_kl_keeps_the_reference_that_kl_reads(tmp_path, peft):
    config = {"num_train_epochs": 2, "learning_rate": 1e-2}
    kwargs = {"retain_objective": KL()} | ({"peft_config": LoraConfig(target_modules=["q_proj"], r=2)} if peft else {})
    live = train(settings(tmp_path / "live", **config), FORGET, RETAIN, **kwargs)
    cached = train(settings(tmp_path / "cached", precompute_ref_logps=True, **config), FORGET, RETAIN, **kwargs)
    assert isinstance(cached.reference, OtherAdapter if peft else FrozenModel)
    assert "ref_logps" in cached.train_dataset.forget.column_names
    assert distance(weights(live.model), weights(cached.model)) <= 1e-5


def test_the_batch_column_wins_over_a_live_reference():
    rows = collate(FORGET) | {"ref_logps": torch.arange(6.0)}
    assert torch.equal(reference_logps(rows, FrozenModel(tiny_llama())), torch.arange(6.0))
    with pytest.raises(ValueError, match="`ref_logps`"):
        reference_logps(collate(FORGET), None)


# ---- LoRA ----


@pytest.mark.parametrize("config", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_lora_with_gradient_checkpointing_moves_every_adapter(tmp_path, config):
    """Reentrant checkpointing needs an input that requires a gradient, or only the last block moves."""
    args = settings(
        tmp_path / "run", gradient_checkpointing=True, gradient_checkpointing_kwargs=config or None, num_train_epochs=1
    )
    trainer = train(args, FORGET, RETAIN, peft_config=LoraConfig(target_modules="all-linear", r=2))
    after = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert len(after) == 2 * 7
    assert [name for name, value in after.items() if not value.abs().max() > 0] == []


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    plain = train(settings(tmp_path / "a"), FORGET, RETAIN)
    checkpointed = train(settings(tmp_path / "b", gradient_checkpointing=True), FORGET, RETAIN)
    assert distance(weights(plain.model), weights(checkpointed.model)) <= 1e-6


def test_lora_npo_equals_a_live_copy_of_the_base(tmp_path):
    """Adapter off as the reference, against the base model passed as `ref_model`: the same training."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    off = train(settings(tmp_path / "a", learning_rate=1e-2), FORGET, RETAIN, peft_config=config)
    passed = train(
        settings(tmp_path / "b", learning_rate=1e-2), FORGET, RETAIN, peft_config=config, ref_model=tiny_llama()
    )
    assert isinstance(off.reference, OtherAdapter) and isinstance(passed.reference, FrozenModel)
    assert distance(weights(off.model), weights(passed.model)) <= 1e-6


def test_saved_model_with_a_frozen_copy_reloads_without_it(tmp_path):
    trainer = train(settings(tmp_path / "run"), FORGET, RETAIN, model=trained_lora())
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run")
    assert torch.equal(logits(reloaded), logits(trainer.model))
    again = BLURTrainer(
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "run", is_trainable=True),
        settings(tmp_path / "b"),
        FORGET,
        RETAIN,
    )
    again.train()
    assert not torch.allclose(logits(again.model), logits(reloaded))
