"""Several trainings by one trainer: `model_init`, `hyperparameter_search`, attempts of `auto_find_batch_size`."""

import signal

import optuna
import pytest
import torch
from peft import LoraConfig
from support.models import examples, tiny_llama
from support.runs import distance, settings, training_logs, weights

from blur_trainer.gradients.rules import BLUR
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN = examples(14, seed=1), examples(9, seed=2)
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def short_of_memory(most, after=0):
    """A model that is out of memory for more than `most` rows, from its call number `after` on."""
    model, calls = tiny_llama(), []

    def forward(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] > most and len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.register_forward_pre_hook(forward, with_kwargs=True)
    return model


# ---- attempts with smaller batches ----


@pytest.mark.parametrize(("after", "ref_seed"), [(0, None), (4, 1)], ids=["at once", "in the third step"])
def test_a_smaller_batch_begins_anew(after, ref_seed, tmp_path):
    """As if that batch had been given: reference, log, signals, checkpoints. (Weights hardly move before.)"""
    config = {"learning_rate": 1e-7, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config |= {"save_total_limit": 1, "precompute_ref_logps": True, "max_steps": 4}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def trained(model, size, **more):
        args = settings(tmp_path / str(size), per_device_train_batch_size=size, **config, **more)
        ref_model = None if ref_seed is None else tiny_llama(ref_seed)  # else the model itself runs out of memory
        trainer = BLURTrainer(model, args, FORGET, RETAIN, ref_model=ref_model)
        trainer.train()
        return trainer

    got, want = trained(short_of_memory(7, after), 8, auto_find_batch_size=True), trained(tiny_llama(), 7)
    assert got.state.train_batch_size == 7
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    for a, b in zip(training_logs(got), training_logs(want), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert distance(weights(got.model), weights(want.model)) < 1e-5
    assert [p.name for p in (tmp_path / "8").glob("checkpoint-*")] == ["checkpoint-4"]
    assert got.args.save_total_limit == 1


class Topics(BLURTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        (batch,) = inputs.values()
        self.seen.setdefault(self.state.global_step, set()).update(batch["topic"].tolist())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_find_batch_size": True, "per_device_train_batch_size": 8},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3}}},
    ],
    ids=["a smaller batch", "accumulation in accelerate's words"],
)
def test_each_step_has_one_topic(config, tmp_path):
    args = settings(tmp_path, max_steps=4, repeat_topics=True, **config)
    data = {"a": examples(16, 1), "b": examples(16, 3)}
    trainer = Topics(short_of_memory(7), args, data, RETAIN, forget_objective=GradAscent())
    trainer.seen = {}
    trainer.train()
    assert trainer.seen == {0: {0}, 1: {1}, 2: {0}, 3: {1}}


# ---- models made anew ----


def searching(folder, **config):
    fixed = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "retain_objective": "kl"}
    args = settings(folder, **(fixed | config))
    benchmarks = {"sum": lambda model: {"of_weights": sum(p.double().abs().sum().item() for p in model.parameters())}}
    kwargs = {"peft_config": LoraConfig(**LORA), "benchmarks": benchmarks}
    return BLURTrainer(None, args, FORGET, RETAIN, model_init=lambda: tiny_llama(), **kwargs)


def test_hyperparameter_search(tmp_path):
    """Each trial is what a new trainer with its settings does, in a folder of its own."""
    grid = {"gamma": [0.25, 2.0], "per_device_train_batch_size": [3]}
    space = lambda trial: {name: trial.suggest_categorical(name, values) for name, values in grid.items()}  # noqa: E731
    found = []

    def objective(metrics):
        found.append((trainer.rule, metrics["eval_sum_of_weights"]))
        return metrics["eval_sum_of_weights"]

    trainer = searching(tmp_path / "search")
    sampler = optuna.samplers.GridSampler(grid, seed=0)
    asked = {"hp_space": space, "compute_objective": objective, "n_trials": 2}
    best = trainer.hyperparameter_search(**asked, backend="optuna", sampler=sampler)
    assert best.objective == min(value for _, value in found)
    for rule, value in found:
        alone = searching(tmp_path / f"alone-{rule.gamma}", gamma=rule.gamma, per_device_train_batch_size=3)
        alone.train()
        assert value == pytest.approx(alone.evaluate()["eval_sum_of_weights"], rel=1e-9)
    assert {rule.gamma for rule, _ in found} == set(grid["gamma"])
    assert sorted(p.parent.name for p in (tmp_path / "search").glob("run-*/checkpoint-2")) == ["run-0", "run-1"]
    with pytest.raises(ValueError, match=r"run-0' already holds a run"):
        trainer.hyperparameter_search(**asked, backend="optuna", sampler=sampler)


def test_each_training_has_a_fresh_model_and_reference(tmp_path):
    seeds = iter(range(9))
    args = settings(tmp_path, precompute_ref_logps=True, max_steps=1)
    trainer = BLURTrainer(None, args, FORGET, RETAIN, model_init=lambda: tiny_llama(next(seeds)))
    assert trainer.model is not None  # the first one
    trainer.train()
    first = list(trainer.train_dataset.forget["ref_logps"])
    trainer.train()
    assert first != list(trainer.train_dataset.forget["ref_logps"])
    assert distance(weights(trainer.model), weights(tiny_llama(2))) < 0.01


def test_settings_changed_between_trainings_are_heard_or_refused(tmp_path):
    args = settings(tmp_path, max_steps=1)
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN)
    trainer.args.gamma, trainer.args.forget_objective_kwargs = 0.5, {"beta": 0.7}
    trainer.args.seed = 7
    trainer.train()
    assert trainer.rule == BLUR(gamma=0.5) and trainer.objectives["forget"] == NPO(beta=0.7)
    assert trainer.train_dataset.seed == 7
    trainer.args.max_length = 5
    with pytest.raises(ValueError, match=r"\['max_length'\] were changed after.*make a new trainer"):
        trainer.train()
    given = BLURTrainer(tiny_llama(), settings(tmp_path / "b"), FORGET, RETAIN, rule=BLUR())
    given.args.gamma = 0.5
    with pytest.raises(ValueError, match=r"\['gamma'\] were changed"):
        given.train()


def test_a_model_and_what_makes_it_are_not_both_given(tmp_path):
    with pytest.raises(ValueError, match="either `model` or `model_init`"):
        BLURTrainer(tiny_llama(), settings(tmp_path), FORGET, RETAIN, model_init=tiny_llama)
    with pytest.raises(TypeError, match=r"got `NoneType`\. Or pass `model_init`"):
        BLURTrainer(None, settings(tmp_path), FORGET, RETAIN)
