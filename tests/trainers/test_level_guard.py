"""Stops at a level and guards the retain loss: what it does, what it says, and that a resumed training does it too."""

import logging
from dataclasses import dataclass

import datasets
import pytest
import torch
from support.models import examples, tiny_llama
from support.runs import distance, settings, weights

from blur_trainer.gradients.rules import BLUR, MGDA, NGDiff, PCGrad, Sum
from blur_trainer.gradients.stateful_rules import GRU, PDU, Constrained
from blur_trainer.objectives.level import TargetLoss
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.level_guard import BEFORE, HALVINGS, STRENGTH, sample_rows, weakens
from blur_trainer.trainers.step import weights_of

FORGET, RETAIN = examples(6), examples(4, 1)
ONLY_FORGET = Sum(1.0, 1e-6)  # nothing holds the retain loss


def make(folder, rule=None, objective=None, model=None, forget=FORGET, retain=RETAIN, **config):
    defaults = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 9, "lr_scheduler_type": "constant"}
    args = settings(folder, **({"forget_level": 50.0, "learning_rate": 1e-2} | defaults | config))
    objective = objective or GradAscent()
    return BLURTrainer(model or tiny_llama(), args, forget, retain, rule=rule, forget_objective=objective)


def history(trainer, key):
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: caplog.text


# ---- the stop ----


def test_training_ends_with_the_first_evaluation_at_the_level(tmp_path, said):
    free = make(tmp_path / "a", forget_level=5.0)
    free.train()
    losses = history(free, "eval_level_forget_loss")
    first = next(step for step, loss in losses if loss >= 5.0)
    assert 2 <= first < 9
    stopped = make(tmp_path / "b", forget_level=5.0, stop_at_level=True)
    stopped.train()
    assert stopped.state.global_step == first
    assert history(stopped, "eval_level_forget_loss") == losses[:first]
    assert f"Step {first}: the level is reached" in said() and "level 5;" in said()


@pytest.mark.full
def test_the_metrics_are_those_of_the_model_and_of_the_best_checkpoint(tmp_path):
    trainer = make(
        tmp_path,
        forget_level=4.8,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="level",
    )
    trainer.train()
    scores = dict(history(trainer, "eval_level_score"))
    best = min(scores, key=scores.get)
    assert trainer.state.best_global_step == best and trainer.state.best_metric == scores[best]
    kept = dict(history(trainer, "eval_level_forget_loss"))[best]
    assert trainer.evaluate()["eval_level_forget_loss"] == pytest.approx(kept, rel=1e-5)
    assert history(trainer, "level/forget_loss")[-1][1] == pytest.approx(kept, rel=1e-5)


def test_an_evaluation_outside_of_training_stops_nothing(tmp_path):
    trainer = make(tmp_path, forget_level=0.1, stop_at_level=True)
    assert trainer.evaluate()["eval_level_score"] == 0.0
    assert not trainer.control.should_training_stop and not history(trainer, STRENGTH)


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (4.5, "was reached"),
        pytest.param(50.0, "was not reached", marks=pytest.mark.full),
        pytest.param(3.0, "was overshot", marks=pytest.mark.full),
    ],
)
def test_the_last_words_say_how_it_ended(level, words, tmp_path, said):
    make(tmp_path, forget_level=level, max_steps=1, learning_rate=1e-4, eval_strategy="no").train()
    assert f"The forget level {words}. Nats per token: forget 4.48" in said()
    assert "retain 4.63, before training 4.64." in said()
    assert "has not moved" not in said()


def test_no_level_no_words(tmp_path, said):
    trainer = make(tmp_path, forget_level=None, eval_strategy="no", max_steps=1)
    trainer.train()
    assert "level" not in said() and not trainer.benchmarks and not history(trainer, BEFORE)


# ---- the guard ----


def test_beyond_the_bound_the_strength_is_halved_and_then_training_ends(tmp_path, said):
    trainer = make(tmp_path, ONLY_FORGET, retain_bound=0.02)
    trainer.train()
    before = history(trainer, BEFORE)[0][1]
    beyond = [step for step, loss in history(trainer, "eval_level_retain_loss") if loss - before > 0.02]
    halved = history(trainer, STRENGTH)
    assert halved == list(zip(beyond[:HALVINGS], (0.5, 0.25, 0.125), strict=True))
    assert trainer.state.global_step == beyond[HALVINGS]
    used = dict(history(trainer, "grad/weight_forget"))
    for step, weight in used.items():
        assert weight == 0.5 ** sum(at < step for at, _ in halved)
    assert "3 halvings of the strength did not help: training ends, these weights stay" in said()
    assert "`load_best_model_at_end=True`" in said()


def test_the_best_checkpoint_within_the_bound_is_restored(tmp_path, said):
    trainer = make(
        tmp_path, ONLY_FORGET, retain_bound=0.02, save_strategy="steps", save_steps=1, load_best_model_at_end=True
    )
    assert trainer.args.metric_for_best_model == "level_score"  # chosen, as nothing else was asked for
    trainer.train()
    scores = dict(history(trainer, "eval_level_score"))
    assert trainer.state.best_global_step == min(scores, key=scores.get) < trainer.state.global_step
    assert "training ends, the best checkpoint so far is restored" in said()
    last = make(tmp_path / "new", ONLY_FORGET)
    last._load_from_checkpoint(str(tmp_path / f"checkpoint-{trainer.state.best_global_step}"))
    assert distance(weights(trainer.model), weights(last.model)) == 0


def test_a_rule_that_does_not_weaken_ends_at_once(tmp_path, said):
    trainer = make(tmp_path, NGDiff(), retain_bound=0.02)
    guard, control = trainer._level, trainer.control
    guard.check.retain_before, guard._running, trainer.state.global_step = 4.0, True, 1
    for retain_loss, stops in ((4.01, False), (4.03, True)):
        found = {"eval_level_forget_loss": 5.0, "eval_level_retain_loss": retain_loss}
        guard.on_evaluate(trainer.args, trainer.state, control, metrics=found)
        assert control.should_training_stop == stops
    assert guard.strength == 1.0
    assert "the rule NGDiff() forgets as strongly whatever the size" in said()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (BLUR(), True),
        (BLUR(lower_level="retain"), True),
        (BLUR(clamp=True), True),
        (Sum(2.0, 0.5), True),
        (Sum(1.0, 0.0), True),
        (PCGrad(), True),
        (GRU(), True),
        (GRU(retain_weight=1.0), True),
        (Constrained(BLUR()), True),
        (PDU(), True),
        (NGDiff(), False),
        (MGDA(), False),
        (Constrained(NGDiff()), False),
    ],
)
def test_which_rules_a_weaker_objective_weakens(rule, expected):
    assert weakens(rule) == expected


@dataclass(frozen=True)
class Fraction(GradAscent):
    share: float = 0.5

    def losses(self, model, batch, reference):
        return self.share * super().losses(model, batch, reference)


class Scaled:
    """What `weights_of` reads of a step."""

    def __init__(self, strength):
        self.strength = strength


@pytest.mark.parametrize("rule", [BLUR(gamma=0.3), BLUR("retain"), Sum(1.0, 2.0), PCGrad(), MGDA(), NGDiff(), GRU()])
def test_a_strength_is_a_factor_of_the_objective(rule):
    size = 3 if isinstance(rule, GRU) else 2
    vectors = torch.randn(size, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = vectors.clone()
    scaled[0] *= 0.25
    want = rule(scaled @ scaled.T) @ scaled
    torch.testing.assert_close(weights_of(Scaled(0.25), rule, vectors @ vectors.T) @ vectors, want)


@pytest.mark.parametrize("single", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_training_of_half_strength_is_one_of_half_the_objective(single, tmp_path):
    config = {"eval_strategy": "no", "max_steps": 2, "single_gradient_buffer": single, "forget_level": None}
    half = make(tmp_path / "a", BLUR(gamma=0.3), objective=Fraction(), **config)
    half.train()
    trainer = make(tmp_path / "b", BLUR(gamma=0.3), **(config | {"forget_level": 1e3}))
    trainer._level.on_train_begin = lambda *args, **kwargs: setattr(trainer._level, "strength", 0.5)
    trainer.train()
    assert distance(weights(half.model), weights(trainer.model)) < 1e-6


# ---- resume ----


def test_a_resumed_training_has_its_strength_and_its_bound(tmp_path):
    stop = 6  # behind the second halving
    config = {"retain_bound": 0.02, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", ONLY_FORGET, **config)
    whole.train()
    assert [at for at, _ in history(whole, STRENGTH) if at <= stop] == [5, 6]
    resumed = make(tmp_path / "resumed", ONLY_FORGET, **config)
    resumed.train(str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == whole.state.global_step > stop
    for key in (BEFORE, STRENGTH, "eval_level_retain_loss", "grad/weight_forget"):
        assert history(resumed, key) == history(whole, key), key
    assert distance(weights(resumed.model), weights(whole.model)) == 0


# ---- the sample ----


def test_the_sample_is_fixed_and_from_everywhere():
    rows = datasets.Dataset.from_list([{"input_ids": [i]} for i in range(1000)])
    found = [row["input_ids"][0] for row in sample_rows(rows)]
    assert len(set(found)) == 128 and found[0] == 0 and found[-1] == 999
    assert len(sample_rows(rows.select(range(5)))) == 5
    assert [row["input_ids"][0] for row in sample_rows(rows.to_iterable_dataset(), 3)] == [0, 1, 2]
    topics = sample_rows({"a": rows.select(range(100)), "b": rows.select(range(900, 1000))}, 10)
    assert [row["input_ids"][0] >= 900 for row in topics] == [False] * 5 + [True] * 5


def test_levels_of_rows_and_no_retain_set(tmp_path):
    levelled = [row | {"forget_level": 3.0 + i} for i, row in enumerate(FORGET)]
    trainer = make(tmp_path / "a", objective=TargetLoss(), forget=levelled, forget_level=None)
    assert trainer.benchmarks["level"].level == pytest.approx(5.5)
    alone = make(tmp_path / "b", Sum(1.0, 0.0), retain=None, max_steps=1, forget_level=9.0, objective=TargetLoss())
    found = alone.evaluate()
    assert "eval_level_score" in found and "eval_level_retain_loss" not in found
    alone.train()


# ---- what is refused ----


def test_what_is_refused_by_name(tmp_path):
    for config, words in (
        ({"stop_at_level": True, "forget_level": None}, "`stop_at_level=True` needs a level"),
        ({"retain_bound": 0.1, "forget_level": None}, "`retain_bound=0.1` needs a level"),
        ({"level_two_sided": True, "forget_level": None}, "`level_two_sided=True` needs a level"),
        ({"level_two_sided": True}, "`two_sided` needs an objective that can bring answers back"),
        ({"stop_at_level": True, "eval_strategy": "no"}, "`stop_at_level=True` is looked at with every evaluation"),
        ({"retain_bound": 0.1, "eval_strategy": "no"}, "`retain_bound=0.1` is looked at"),
        ({"retain_bound": 0.0}, "`retain_bound` must be"),
        ({"retain_bound": 0.1, "retain": None, "rule": Sum(1.0, 0.0)}, "no retain set"),
    ):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, **config)
    args = settings(tmp_path, forget_level=4.0)
    with pytest.raises(ValueError, match="name `level` in `benchmarks`"):
        BLURTrainer(tiny_llama(), args, FORGET, RETAIN, benchmarks={"level": lambda model: {"x": 1.0}})


def test_training_goes_on_while_the_retain_loss_is_far_from_where_it_was(tmp_path, said):
    upset = {"rule": ONLY_FORGET, "retain": FORGET[:4]}  # retaining pays whatever forgetting gains
    trainer = make(tmp_path, **upset, forget_level=5.0, stop_at_level=True, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6 and history(trainer, "eval_level_forget_loss")[-1][1] > 5.0
    assert "the level is reached, but retaining pays more than 0.1 nats" in said()
