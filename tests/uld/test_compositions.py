"""Offset unlearning and WHP: the rules literally, all that holds for ULD's composition, and training through it."""

import math

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from support.logit_models import CLOSE, MODES, generate, learned, padded, prompts, tiny
from support.models import VOCAB, examples
from support.runs import distance, settings, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from blur_trainer.models.logit_composition import COMPOSITIONS, composition_named
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.models.truncation import without_adapter
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.grad_diff import GradDiffTrainer

# composition, architecture, the assistant's layers, whether it is a model of its own
PAIRS = {
    "offset": ("offset", "Llama", 2, False),
    "offset of a smaller model": ("offset", "Llama", 2, True),
    "offset, sliding window": ("offset", "Gemma2", 2, False),
    "offset, another kind of layer": ("offset", "GPT2", 2, False),
    "whp of all layers": ("whp", "Llama", 3, False),
    "whp of a smaller model": ("whp", "Qwen2", 1, True),
}


def smaller(layers: int) -> transformers.LlamaForCausalLM:
    """Of another width and other weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config).eval()


def make(composition: str, architecture: str, layers: int, own: bool, **kwargs) -> LogitDifferenceModel:
    target = tiny(architecture)
    assistant = learned(lora_assistant(smaller(layers) if own else target, layers))
    return LogitDifferenceModel(LogitDifferenceConfig(composition=composition, **kwargs), target, assistant)


@pytest.fixture(scope="module", params=PAIRS)
def model(request):
    return make(*PAIRS[request.param], top_logit_filter=0.15)


def fresh(layers: int = 2, dropout: float = 0.0, seed: int = 0, **kwargs) -> LogitDifferenceModel:
    """An offset model before training: B = 0."""
    torch.manual_seed(seed)
    target, lora = tiny("Llama"), LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, lora_dropout=dropout)
    return LogitDifferenceModel(
        LogitDifferenceConfig(composition="offset", **kwargs), target, lora_assistant(target, layers, lora)
    )


# --- the rules --------------------------------------------------------------------------------------------------------


def literal(name: str, target: float, assistant: float, base: float, weight: float) -> float:
    if name == "offset":
        return target + weight * (assistant - base)
    if name == "whp":
        return target - abs(weight) * max(assistant - target, 0.0)
    return target + weight * assistant


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("weight", [-1.5, 0.7])
@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_the_rule_is_its_literal_form(name, weight, ratio):
    torch.manual_seed(0)
    parts = [2 * torch.randn(3, 20, dtype=torch.float64) for _ in range(3)]
    before = [part.clone() for part in parts]
    composed = COMPOSITIONS[name](*parts, weight, ratio)
    for row in range(3):
        target, assistant, base = (part[row].tolist() for part in parts)
        highest, last = max(target), sorted(target)[-4]
        passes = [not ratio or t >= highest + math.log(ratio) or t >= last for t in target]
        values = [literal(name, t, a, b, weight) for t, a, b in zip(target, assistant, base, strict=True)]
        before_sum, after_sum = (
            sum(math.exp(x) for x, ok in zip(logits, passes, strict=True) if ok) for logits in (target, values)
        )
        shift = math.log(before_sum / after_sum) if ratio else 0.0
        expected = [v + shift if ok else t for v, t, ok in zip(values, target, passes, strict=True)]
        assert composed[row].tolist() == pytest.approx(expected)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert COMPOSITIONS[name](*parts, 0.0, ratio) is parts[0]


def test_whp_raises_no_token():
    target, assistant = torch.randn(5, 30), torch.randn(5, 30)
    composed = COMPOSITIONS["whp"](target, assistant, None, -2.0, 0.0)
    assert (composed <= target).all() and torch.equal(composed[assistant <= target], target[assistant <= target])
    assert torch.equal(composed, COMPOSITIONS["whp"](target, assistant, None, 2.0, 0.0))
    assert torch.equal(COMPOSITIONS["whp"](target, target, None, -2.0, 0.0), target)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_gradients_of_the_rule(name):
    """Also with the filter."""
    torch.manual_seed(0)
    target, assistant, base = torch.randn(3, 2, 9, dtype=torch.float64).unbind()

    def composed(logits):
        return COMPOSITIONS[name](target, logits, base, -0.7, 0.2)

    assert torch.autograd.gradcheck(composed, assistant.requires_grad_())


# --- the model --------------------------------------------------------------------------------------------------------


def test_forward_is_the_rule_over_the_parts(model):
    """The base is what PEFT's own switch gives."""
    batch, name = padded(prompts()), model.config.composition
    target, on = model.target(**batch).logits, model.assistant(**batch).logits
    with model.assistant.disable_adapter():
        off = model.assistant(**batch).logits
    assert not torch.equal(on, off)
    assert torch.equal(model(**batch).logits, COMPOSITIONS[name](target, on, off, model.config.weight, 0.15))


def test_only_adapters_and_other_models_are_extra(model):
    def size(parameters):
        return sum({id(p): p.numel() for p in parameters}.values())

    adapter = size(p for n, p in model.named_parameters() if "lora_" in n)
    own = 0 if shares(model) else size(p for n, p in model.assistant.named_parameters() if "lora_" not in n)
    assert size(model.parameters()) == size(model.target.parameters()) + adapter + own


def shares(model) -> bool:
    mine = {id(p) for p in model.target.parameters()}
    return any(id(p) in mine for p in model.assistant.parameters())


def test_cached_is_uncached(model):
    (ids,) = prompts((14,))
    whole, cache, steps = model(ids, use_cache=False), None, []
    for start, end in [(0, 4), (4, 9), *((t, t + 1) for t in range(9, 14))]:
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits, **CLOSE)
    assert {layer.get_seq_length() for layer in cache.layers} == {14}
    parts = [model.target, model.assistant, *([model.base] if model.base is not None else [])]
    assert len(cache.layers) == sum(part.config.num_hidden_layers for part in parts)


@pytest.mark.parametrize("mode", MODES)
def test_generate_with_caches_is_generate_without(model, mode):
    batch = padded(prompts())
    cached = generate(model, batch, **MODES[mode])
    plain = generate(model, batch, **MODES[mode], use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **CLOSE)


def test_generate_speaks_from_forwards_distribution(model):
    rows = prompts()
    batch = generate(model, padded(rows), do_sample=False)
    for i, row in enumerate(rows):
        out = generate(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}, do_sample=False)
        whole = model(out.sequences, use_cache=False).logits[0, row.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.cat(out.logits), whole, **CLOSE)
        assert torch.equal(batch.sequences[i, -8:], out.sequences[0, -8:])


def test_weight_0_is_the_target(model):
    batch, before = padded(prompts()), model.config.weight
    model.config.weight = 0.0
    try:
        for mode in ("greedy", "beam"):
            ours, theirs = generate(model, batch, **MODES[mode]), generate(model.target, batch, **MODES[mode])
            assert torch.equal(ours.sequences, theirs.sequences)
            assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
    finally:
        model.config.weight = before


def test_loaded_is_saved(model, tmp_path):
    model.target.save_pretrained(tmp_path / "target")
    model.config.target = str(tmp_path / "target")
    if not shares(model):
        with pytest.raises(ValueError, match=r"set model\.config\.assistant"):
            model.save_pretrained(tmp_path / "unlearned")
        smaller(model.config.num_assistant_layers).save_pretrained(tmp_path / "small")
        model.config.assistant = str(tmp_path / "small")
    batch = padded(prompts())
    try:
        model.save_pretrained(tmp_path / "unlearned")
        for load in (LogitDifferenceModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
            loaded = load(tmp_path / "unlearned")
            for name in ("target", "assistant", "composition", "num_assistant_layers", "weight", "top_logit_filter"):
                assert getattr(loaded.config, name) == getattr(model.config, name)
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
            assert not any(p.requires_grad for p in loaded.parameters())
        if model.config.assistant:
            with pytest.raises(ValueError, match="is a view of the target"):
                view = lora_assistant(loaded.target, loaded.config.num_assistant_layers)
                LogitDifferenceModel(loaded.config, loaded.target, view)
    finally:
        model.config.assistant = None


def test_loaded_over_models_that_are_there(tmp_path):
    model = make("offset", "Llama", 2, True)
    model.config.target, model.config.assistant = "a/target", "an/assistant"
    model.save_pretrained(tmp_path)
    loaded = LogitDifferenceModel.from_pretrained(
        tmp_path, target=model.target, assistant=smaller(2), is_trainable=True
    )
    assert torch.equal(loaded(prompts()[0]).logits, model(prompts()[0]).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


# --- what the configuration says --------------------------------------------------------------------------------------


def test_settings_are_the_compositions_own(tmp_path):
    assert [(c.weight, c.top_logit_filter) for c in COMPOSITIONS.values()] == [(-0.8, 0.01), (1.0, 0.0), (-1.0, 0.0)]
    for name, usual in COMPOSITIONS.items():
        config = LogitDifferenceConfig(composition=name)
        assert (config.weight, config.top_logit_filter) == (usual.weight, usual.top_logit_filter)
        for weight, ratio in [(-0.8, 0.01), (0.0, 0.0), (0.5, 0.2)]:  # also another composition's
            LogitDifferenceConfig(composition=name, weight=weight, top_logit_filter=ratio).save_pretrained(tmp_path)
            again = LogitDifferenceConfig.from_pretrained(tmp_path)
            assert (again.composition, again.weight, again.top_logit_filter) == (name, weight, ratio)
    for make_it in (composition_named, lambda name: LogitDifferenceConfig(composition=name)):
        with pytest.raises(ValueError, match="composition='sum': give one of 'uld', 'offset', 'whp'"):
            make_it("sum")


def test_a_composition_that_is_changed_later():
    model, ids = make("uld", "Llama", 2, False), prompts()[0]
    cache = model(ids).past_key_values
    model.config.composition = "whp"  # reads the same two parts
    expected = COMPOSITIONS["whp"](model.target(ids).logits, model.assistant(ids).logits, None, -0.8, 0.01)
    assert torch.equal(model(ids).logits, expected)
    model.config.composition = "offset"
    with pytest.raises(ValueError, match="make a new LogitDifferenceModel"):
        model(ids)
    with pytest.raises(ValueError, match="begun by another composition"):
        fresh()(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "extra", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}]
)
def test_an_adapter_that_cannot_be_taken_off(extra):
    assistant = lora_assistant(tiny("Llama"), 2, LoraConfig(target_modules=["q_proj"], **extra))
    with pytest.raises(ValueError, match=f"{next(iter(extra))}.*it cannot be taken off"):
        without_adapter(assistant)


# --- training the offset ----------------------------------------------------------------------------------------------


def test_an_untrained_offset_is_the_target():
    model, batch = fresh(dropout=0.5), padded(prompts())
    for mode in (False, True):
        model.train(mode)
        assert torch.equal(model(**batch).logits, model.target(**batch).logits)
    assert model.assistant.training and not model.target.training and not model.base.training
    learned(model.assistant)
    model.train()
    first, second = model(**batch).logits, model(**batch).logits
    assert not torch.equal(first, second) and not model.eval().assistant.training


def test_gradient_checkpointing_changes_no_gradient():
    ids, gradients = prompts((9,))[0], []
    for checkpointing in (False, True):
        model = fresh()
        learned(model.assistant)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        runs = dict.fromkeys(("target", "assistant", "base"), 0)
        for part in runs:
            layer = next(m for n, m in getattr(model, part).named_modules() if n.endswith("layers.0.mlp.up_proj"))
            layer.register_forward_hook(lambda *_, part=part, runs=runs: runs.update({part: runs[part] + 1}))
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert runs == {"target": 1, "assistant": 1 + checkpointing, "base": 1}  # what is frozen is not run again
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


FORGET, RETAIN = examples(6), examples(6, 1)
TRAININGS = {
    "GradDiff": (GradDiffTrainer, GradAscent()),
    "BLUR-NPO": (BLURTrainer, NPO(beta=0.1)),
}


def nll(model, rows=FORGET) -> float:
    with torch.no_grad():
        losses = [
            model.eval()(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss for row in rows
        ]
    return sum(losses).item() / len(losses)


def trainer_of(name: str, output_dir, model=None, callbacks=(), **kwargs):
    trainer, objective = TRAININGS[name]
    args = settings(output_dir, trainer.config_class, learning_rate=3e-2, num_train_epochs=3, **kwargs)
    model = fresh(dropout=0.1) if model is None else model
    model.config.target = str(output_dir.parent / "target")
    reference = {"ref_model": model.target} if name == "BLUR-NPO" else {}
    return trainer(model, args, FORGET, RETAIN, callbacks=list(callbacks), forget_objective=objective, **reference)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            control.should_training_stop = control.should_save = True


@pytest.mark.parametrize("name", TRAININGS)
def test_training_the_composed_model(name, tmp_path):
    trainer = trainer_of(name, tmp_path / "run")
    model, before = trainer.model, nll(trainer.model)
    target, adapter = weights(model.target), weights(model.assistant)
    model.target.save_pretrained(tmp_path / "target")
    trainer.train()
    assert nll(model) > before + 0.5
    assert distance(weights(model.target), target) == 0
    assert distance(weights(model.assistant), adapter) > 0
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)
    trainer.save_model()
    loaded = LogitDifferenceModel.from_pretrained(tmp_path / "run")
    batch = padded(prompts())
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    assert all("lora_" in key for key in load_file(tmp_path / "run" / "model.safetensors"))


@pytest.mark.parametrize("name", TRAININGS)
def test_resumed_is_uninterrupted(name, tmp_path):
    whole = trainer_of(name, tmp_path / "whole")
    whole.train()
    trainer_of(name, tmp_path / "run", callbacks=[StopAt()], save_strategy="steps", save_steps=100).train()
    resumed = trainer_of(name, tmp_path / "run", model=fresh(dropout=0.1, seed=9))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 9
    assert distance(weights(resumed.model), weights(whole.model)) == 0


def test_the_target_is_the_reference(tmp_path):
    """What the trainer takes if nothing is passed, a copy of the composed model, says the same and costs a target."""
    given = trainer_of("BLUR-NPO", tmp_path / "given")
    given.train()
    args, model = settings(tmp_path / "copied", learning_rate=3e-2, num_train_epochs=3), fresh(dropout=0.1)
    copied = BLURTrainer(model, args, FORGET, RETAIN, forget_objective=NPO(beta=0.1))
    copied.train()
    assert distance(weights(given.model), weights(copied.model)) == 0


def test_checkpointing_and_the_best_checkpoint_in_a_trainer(tmp_path):
    """Trainer's own ways to a model's layers and back to its weights."""
    best = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    args = settings(tmp_path / "run", learning_rate=3e-2, gradient_checkpointing=True, **best)
    model = fresh()
    model.config.target = "a/target"
    trainer = BLURTrainer(model, args, FORGET, RETAIN, eval_dataset=FORGET, forget_objective=GradAscent())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses) and losses[1] > losses[0] + 0.01  # forgets: the first is the best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0])
