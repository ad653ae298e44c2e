"""Evaluation on a schedule: literal numbers, the best step's weights, and a training that does not notice."""

import json

import pytest
import torch
from peft import LoraConfig
from support.models import collate, examples, tiny_llama
from support.runs import distance, logits, settings, train, training_logs, weights
from support.tiny_tokenizer import tiny_tokenizer
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback

from blur_trainer.gradients.rules import Sum
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN, HOLD = examples(6), examples(5, 1), examples(4, 2)
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def literal_nll(model, rows) -> tuple[float, int]:
    """Summed `-log p` of the answer tokens and their number, one row and one token at a time."""
    total, count = 0.0, 0
    model.eval()
    for row in rows:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"]):
            if position and label != -100:
                total -= torch.log_softmax(scores[position - 1], -1)[label].item()
                count += 1
    return total, count


def mean_nll(model, rows) -> float:
    total, count = literal_nll(model, rows)
    return total / count


def mean_of_batch_means(model, rows, batch_size: int) -> float:
    """`transformers.Trainer`'s eval loss: token mean per batch, batches weighted by their examples."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return sum(mean_nll(model, batch) * len(batch) for batch in batches) / len(rows)


def history(trainer, key: str) -> dict[int, float]:
    """step -> value."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


# ---- datasets ----


def test_eval_loss_is_the_literal_nll(tmp_path):
    args = settings(tmp_path / "run", per_device_eval_batch_size=8)
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, eval_dataset=HOLD)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_nll(tiny_llama(), HOLD), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_eval_loss_in_several_batches_is_trainers_own(tmp_path, batch_size):
    args = settings(tmp_path / "run", per_device_eval_batch_size=batch_size)
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, eval_dataset=HOLD)
    expected = mean_of_batch_means(tiny_llama(), HOLD, batch_size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_dict_of_datasets_is_evaluated_by_name(tmp_path):
    sets = {"forget": FORGET, "retain": RETAIN, "hold": HOLD}
    args = settings(tmp_path / "run", per_device_eval_batch_size=8, max_steps=2, **EVERY_STEP)
    trainer = train(args, FORGET, RETAIN, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(mean_nll(trainer.model, rows), rel=1e-5)
        assert set(history(trainer, f"eval_{name}_loss")) == {1, 2}
    assert "eval_loss" not in metrics


def test_the_logged_numbers_are_those_of_that_step(tmp_path):
    literal = {}

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            literal[state.global_step] = mean_nll(model, HOLD)

    args = settings(tmp_path / "run", per_device_eval_batch_size=8, max_steps=4, **EVERY_STEP)
    trainer = train(args, FORGET, RETAIN, eval_dataset=HOLD, callbacks=[Measure()])
    assert history(trainer, "eval_loss") == pytest.approx(literal, rel=1e-5)
    assert len(set(literal.values())) == 4


def test_dropout_is_off_in_evaluation(tmp_path):
    args = settings(tmp_path / "run", per_device_eval_batch_size=8, max_steps=1, **EVERY_STEP)
    trainer = train(args, FORGET, RETAIN, model=tiny_llama(dropout=0.5), eval_dataset=HOLD)
    assert history(trainer, "eval_loss")[1] == pytest.approx(mean_nll(trainer.model, HOLD), rel=1e-5)


def test_padding_and_prompt_do_not_count(tmp_path):
    """The batch, written out, through the model's own loss."""
    args = settings(tmp_path / "run", per_device_eval_batch_size=8)
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, eval_dataset=HOLD)
    with torch.no_grad():
        expected = tiny_llama()(**collate(HOLD)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_eval_datasets_come_in_every_format(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    sets = {
        "qa": [{"question": "Who?", "answer": "Mara Velin."}],
        "text": [{"text": "The harbour was rebuilt twice."}],
        "pc": [{"prompt": "The harbour", "completion": " was rebuilt"}],
    }
    args = settings(tmp_path / "run")
    trainer = BLURTrainer(
        LlamaForCausalLM(config), args, sets["qa"], sets["text"], eval_dataset=sets, processing_class=tiny_tokenizer()
    )
    metrics = trainer.evaluate()
    assert {f"eval_{name}_loss" for name in sets} <= set(metrics)
    assert all(torch.isfinite(torch.tensor(metrics[f"eval_{name}_loss"])) for name in sets)


def test_a_dataset_given_to_evaluate_is_evaluated_alone(tmp_path):
    """As in Trainer: an override replaces the datasets, and benchmarks have their own data."""
    args = settings(tmp_path / "run", per_device_eval_batch_size=8)
    trainer = BLURTrainer(
        tiny_llama(), args, FORGET, RETAIN, eval_dataset={"hold": HOLD}, benchmarks={"b": lambda model: {"x": 1.0}}
    )
    rows = trainer.eval_dataset["hold"]
    metrics = trainer.evaluate(rows, metric_key_prefix="test")
    assert metrics["test_loss"] == pytest.approx(mean_nll(tiny_llama(), HOLD), rel=1e-5)
    assert not any(key.startswith(("eval_", "test_b_")) for key in metrics)
    named = trainer.evaluate({"a": rows, "b": rows}, metric_key_prefix="test")
    assert named["test_a_loss"] == named["test_b_loss"] == pytest.approx(metrics["test_loss"])


# ---- benchmarks ----


class Norm:
    """A benchmark: any callable from the model to numbers. Remembers when it ran and in which mode."""

    def __init__(self):
        self.values, self.modes = [], []

    def __call__(self, model):
        self.values.append(sum(parameter.square().sum().item() for parameter in model.parameters()))
        self.modes.append(model.training)
        return {"square": self.values[-1], "half": torch.tensor(self.values[-1] / 2)}


def test_benchmarks_run_on_schedule_and_are_logged_by_name(tmp_path):
    norm = Norm()
    args = settings(tmp_path / "run", eval_strategy="steps", eval_steps=2, max_steps=6)
    trainer = train(args, FORGET, RETAIN, benchmarks={"norm": norm, "other": lambda model: {"one": 1}})
    assert history(trainer, "eval_norm_square") == dict(zip((2, 4, 6), norm.values, strict=True))
    assert history(trainer, "eval_norm_half") == pytest.approx(
        {step: value / 2 for step, value in zip((2, 4, 6), norm.values, strict=True)}
    )
    assert history(trainer, "eval_other_one") == {2: 1.0, 4: 1.0, 6: 1.0}
    assert len(set(norm.values)) == 3
    json.dumps(trainer.state.log_history)  # numbers, not tensors


def test_benchmarks_and_datasets_together(tmp_path):
    norm = Norm()
    args = settings(tmp_path / "run", max_steps=2, per_device_eval_batch_size=8, **EVERY_STEP)
    trainer = train(args, FORGET, RETAIN, eval_dataset=HOLD, benchmarks={"norm": norm})
    assert set(history(trainer, "eval_loss")) == set(history(trainer, "eval_norm_square")) == {1, 2}
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(mean_nll(trainer.model, HOLD), rel=1e-5)
    assert metrics["eval_norm_square"] == norm.values[-1]


def test_evaluation_on_epochs_and_on_start(tmp_path):
    norm = Norm()
    args = settings(tmp_path / "run", eval_strategy="epoch", eval_on_start=True)
    trainer = train(args, FORGET, RETAIN, benchmarks={"norm": norm})
    assert list(history(trainer, "eval_norm_square")) == [0, 3, 6]


def test_without_a_schedule_nothing_runs(tmp_path):
    norm = Norm()
    trainer = train(settings(tmp_path / "run"), FORGET, RETAIN, benchmarks={"norm": norm}, eval_dataset=HOLD)
    assert norm.values == [] and not history(trainer, "eval_loss")


@pytest.mark.parametrize("eval_dataset", [None, HOLD], ids=["alone", "after a dataset"])
def test_benchmarks_see_the_model_in_evaluation_mode(tmp_path, eval_dataset):
    """A benchmark that forgets `model.eval()` would measure dropout, and only where no dataset is evaluated first."""
    norm = Norm()
    args = settings(tmp_path / "run", max_steps=2, **EVERY_STEP)
    train(args, FORGET, RETAIN, model=tiny_llama(dropout=0.5), benchmarks={"norm": norm}, eval_dataset=eval_dataset)
    assert norm.modes == [False, False]


def test_training_goes_on_in_training_mode(tmp_path):
    modes = []

    class Mode(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            modes.append(model.training)

    args = settings(tmp_path / "run", max_steps=3, **EVERY_STEP)
    train(args, FORGET, RETAIN, benchmarks={"b": lambda model: {"x": float(model.eval().training)}}, callbacks=[Mode()])
    assert modes == [True, True, True]


def test_a_benchmark_gets_the_adapter_too(tmp_path):
    seen = []
    args = settings(tmp_path / "run", max_steps=2, learning_rate=3e-2, **EVERY_STEP)
    trainer = train(
        args,
        FORGET,
        RETAIN,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
        benchmarks={"b": lambda model: seen.append(logits(model)) or {"x": 0.0}},
    )
    assert torch.equal(seen[-1], logits(trainer.model)) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("wrong", [{"x": "high"}, {"x": None}, {"x": [1.0]}], ids=str)
def test_a_benchmark_that_answers_no_number_says_so(tmp_path, wrong):
    args = settings(tmp_path / "run", max_steps=1, **EVERY_STEP)
    with pytest.raises((TypeError, ValueError)):
        train(args, FORGET, RETAIN, benchmarks={"b": lambda model: wrong})


# ---- the best checkpoint ----


def scripted(values):
    """A benchmark whose numbers are known in advance."""
    answers = iter(values)
    return {"muse": lambda model: {"score": next(answers)}}


@pytest.mark.parametrize("name", ["eval_muse_score", "muse_score"])
@pytest.mark.parametrize(
    ("values", "greater", "best"), [([1, 5, 3, 2], True, 2), ([4, 3, 1, 2], False, 3), ([1, 2, 3, 4], True, 4)]
)
@pytest.mark.parametrize("with_dataset", [False, True], ids=["benchmark alone", "with a dataset"])
def test_the_best_steps_weights_are_loaded(tmp_path, name, values, greater, best, with_dataset):
    per_step = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            per_step[state.global_step] = weights(model)

    args = settings(
        tmp_path / "run",
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=name,
        greater_is_better=greater,
        **EVERY_STEP,
    )
    trainer = train(
        args,
        FORGET,
        RETAIN,
        benchmarks=scripted(values),
        callbacks=[Keep()],
        eval_dataset=HOLD if with_dataset else None,
    )
    assert trainer.state.best_metric == values[best - 1]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    found = weights(trainer.model)
    assert [step for step in per_step if distance(per_step[step], found) == 0] == [best]


def test_the_best_adapter_is_loaded(tmp_path):
    per_step = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            per_step[state.global_step] = weights(model)

    args = settings(
        tmp_path / "run",
        max_steps=3,
        learning_rate=3e-2,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="muse_score",
        greater_is_better=True,
        **EVERY_STEP,
    )
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer = train(args, FORGET, RETAIN, benchmarks=scripted([1, 3, 2]), callbacks=[Keep()], peft_config=config)
    found = weights(trainer.model)
    assert [step for step in per_step if distance(per_step[step], found) == 0] == [2]


@pytest.mark.parametrize("with_dataset", [False, True], ids=["benchmark alone", "with a dataset"])
def test_early_stopping_on_a_benchmark(tmp_path, with_dataset):
    """Patience 2: 5 is the best, 4 and 3 are worse, so step 4 is the last of 9."""
    args = settings(
        tmp_path / "run",
        num_train_epochs=3,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="muse_score",
        greater_is_better=True,
        **EVERY_STEP,
    )
    trainer = train(
        args,
        FORGET,
        RETAIN,
        benchmarks=scripted([1, 5, 4, 3, 2, 1, 1, 1, 1]),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_dataset={"hold": HOLD, "retain": RETAIN} if with_dataset else None,
    )
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_saving_only_the_best(tmp_path):
    args = settings(
        tmp_path / "run",
        max_steps=4,
        save_strategy="best",
        metric_for_best_model="muse_score",
        greater_is_better=True,
        **EVERY_STEP,
    )
    train(args, FORGET, RETAIN, benchmarks=scripted([1, 3, 2, 4]))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{i}" for i in (1, 2, 4)
    ]


def test_an_unknown_metric_for_the_best_model_is_named(tmp_path):
    args = settings(
        tmp_path / "run",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="muse_scoer",
        **EVERY_STEP,
    )
    with pytest.raises(KeyError, match=r"muse_scoer.*eval_muse_score"):
        train(args, FORGET, RETAIN, benchmarks=scripted([1]))


# ---- training does not notice ----


@pytest.mark.parametrize("what", ["dataset", "datasets", "benchmark", "drawing benchmark", "everything"])
def test_evaluation_does_not_change_the_trajectory(tmp_path, what):
    """With dropout on: a number drawn in an evaluation would shift all masks that follow."""

    def draw(model):
        return {"x": torch.rand(3).sum().item()}

    kwargs = {
        "dataset": {"eval_dataset": HOLD},
        "datasets": {"eval_dataset": {"hold": HOLD, "retain": RETAIN}},
        "benchmark": {"benchmarks": {"norm": Norm()}},
        "drawing benchmark": {"benchmarks": {"draw": draw}},
        "everything": {"eval_dataset": HOLD, "benchmarks": {"norm": Norm(), "draw": draw}},
    }[what]
    config = {"gradient_accumulation_steps": 2}
    plain = train(settings(tmp_path / "a", **config), FORGET, RETAIN, model=tiny_llama(dropout=0.3))
    other = train(
        settings(tmp_path / "b", **config, **EVERY_STEP), FORGET, RETAIN, model=tiny_llama(dropout=0.3), **kwargs
    )
    assert [key for key in other.state.log_history[1] if key.startswith("eval_")]
    difference = distance(weights(plain.model), weights(other.model))
    assert difference == 0


def test_training_logs_are_unchanged_by_evaluation(tmp_path):
    """Losses and gradients are means since the last *training* log: an evaluation must not drain them."""
    config = {"logging_steps": 3, "max_steps": 6}
    plain = train(settings(tmp_path / "a", **config), FORGET, RETAIN)
    other = train(settings(tmp_path / "b", **config, **EVERY_STEP), FORGET, RETAIN, eval_dataset=HOLD)
    for a, b in zip(training_logs(plain), training_logs(other), strict=True):
        assert a == b


def test_the_live_reference_is_untouched_by_evaluation(tmp_path):
    args = settings(tmp_path / "run", **EVERY_STEP)
    trainer = train(args, FORGET, RETAIN, eval_dataset=HOLD, benchmarks={"norm": Norm()})
    assert torch.equal(logits(trainer.reference.model), logits(tiny_llama()))


def test_evaluation_without_a_retain_set(tmp_path):
    args = settings(tmp_path / "run", max_steps=2, per_device_eval_batch_size=8, **EVERY_STEP)
    trainer = train(args, FORGET, None, rule=Sum(retain_weight=0), eval_dataset={"forget": FORGET})
    assert history(trainer, "eval_forget_loss")[2] == pytest.approx(mean_nll(trainer.model, FORGET), rel=1e-5)
