"""A level in a training: what reads it, what is wrapped, what is refused, what is said."""

import logging

import pytest
from support.models import examples, tiny_llama
from support.runs import distance, settings, train, training_logs, weights
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.gradients.rules import Sum
from blur_trainer.objectives.level import TargetLoss, Until
from blur_trainer.objectives.preference import NPO, AltPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN = examples(4), examples(3, 1)
LEVELS = [row | {"forget_level": level} for row, level in zip(FORGET, (3.0, 4.2, 5.0, 9.0), strict=True)]
#: a level that every row has reached before training, and one that none reaches
LOW, HIGH = 1e-3, 1e3


def after(folder, forget=FORGET, model=None, objective=None, **config):
    args = settings(folder, **({"max_steps": 2, "forget_level": None} | config))
    return weights(train(args, forget, RETAIN, model, forget_objective=objective).model)


def test_a_level_that_nobody_reaches_changes_nothing_and_one_that_all_have_leaves_retain_alone(tmp_path):
    plain = after(tmp_path / "a")
    assert distance(plain, after(tmp_path / "b", forget_level=HIGH)) == 0
    only_retain = {"rule": "sum", "forget_weight": 0.0}
    assert distance(after(tmp_path / "c", **only_retain), after(tmp_path / "d", forget_level=LOW)) == 0


def test_the_column_by_config_by_object_and_as_a_number(tmp_path):
    column = after(tmp_path / "a", LEVELS, forget_level="column")
    assert distance(column, after(tmp_path / "b", LEVELS, objective=Until(NPO()))) == 0
    assert distance(column, after(tmp_path / "d", forget_level=4.2)) > 1e-5
    same = [row | {"forget_level": 4.2} for row in FORGET]
    assert distance(after(tmp_path / "e", same, forget_level="column"), after(tmp_path / "f", forget_level=4.2)) == 0


def test_what_went_beyond_its_level_is_drawn_back(tmp_path):
    """All rows are beyond: pushed only, they have no gradient; drawn back, they have one once the model has moved."""
    rmu = {"forget_objective": "rmu", "forget_objective_kwargs": {"layer": 0}, "forget_level": LOW, "max_steps": 3}
    pushed = after(tmp_path / "a", **rmu)
    drawn = after(tmp_path / "b", **rmu, level_two_sided=True)
    assert distance(pushed, drawn) > 1e-5
    assert distance(drawn, after(tmp_path / "c", objective=Until(RMU(0), LOW, two_sided=True), max_steps=3)) == 0


@pytest.mark.full
@pytest.mark.parametrize("config", [{"single_gradient_buffer": True}, {"precompute_ref_logps": True}])
def test_one_buffer_and_kept_scores_give_the_same(config, tmp_path):
    plain = after(tmp_path / "a", LEVELS, forget_level="column")
    assert distance(plain, after(tmp_path / "b", LEVELS, forget_level="column", **config)) < 1e-6


def test_topics_reach_the_objective_inside(tmp_path):
    args = settings(
        tmp_path / "a",
        max_steps=4,
        repeat_topics=True,
        forget_level="column",
        topics={"bio": {"coefficient": 3.0}},
    )
    trainer = BLURTrainer(
        tiny_llama(), args, {"bio": LEVELS, "cyber": LEVELS[:2]}, RETAIN, forget_objective=RMU(layer=0, coefficient=2.0)
    )
    inner = trainer.objectives["forget"].objective
    assert inner.topics == ("bio", "cyber") and inner.coefficients == [3.0, 2.0]
    trainer.train()
    assert trainer.method == "BLUR-RMU-Until"


def test_the_alternatives_of_a_row_keep_its_level(tmp_path):
    rows = [{"question": f"Who is {name}?", "answer": f"{name} is a painter.", "forget_level": 4.0} for name in "AB"]
    args = settings(tmp_path / "a", max_steps=1, forget_level="column")
    objective = AltPO(num_alternatives=2, max_new_tokens=4)
    tokenizer = tiny_tokenizer()
    model = tiny_llama(0)
    model.resize_token_embeddings(len(tokenizer))
    trainer = BLURTrainer(model, args, rows, rows, processing_class=tokenizer, forget_objective=objective)
    assert set(trainer.train_dataset.forget["forget_level"]) == {4.0} and len(trainer.train_dataset) > 2


def test_a_missing_column_is_refused_before_training(tmp_path):
    for config in ({"forget_objective": "target_loss"}, {"forget_level": "column"}):
        with pytest.raises(ValueError, match="`forget` dataset has no column `forget_level`"):
            BLURTrainer(tiny_llama(), settings(tmp_path / "a", **config), FORGET, RETAIN)
    with pytest.raises(ValueError, match=r"row 1 of the `forget` dataset"):
        rows = [*LEVELS[:1], LEVELS[1] | {"forget_level": -2.0}]
        BLURTrainer(tiny_llama(), settings(tmp_path / "a", forget_level="column"), rows, RETAIN)


def test_a_column_that_is_not_read_is_said(tmp_path, caplog):
    def said(forget, **config):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            BLURTrainer(tiny_llama(), settings(tmp_path / "a", **config), forget, RETAIN)
        return "column `forget_level`" in caplog.text

    assert said(LEVELS) and said(LEVELS, forget_level=4.0)
    assert not said(LEVELS, forget_level="column") and not said(FORGET)


@pytest.mark.full
def test_a_retain_set_with_the_column_is_as_one_without(tmp_path):
    args = settings(tmp_path / "a", max_steps=2, forget_objective="target_loss")
    plain = train(args, LEVELS, RETAIN)
    rows = [row | {"forget_level": None} for row in RETAIN]
    other = train(settings(tmp_path / "b", max_steps=2, forget_objective="target_loss"), LEVELS, rows)
    assert distance(weights(plain.model), weights(other.model)) == 0


@pytest.mark.full
def test_target_loss_pulls_back_what_overshot(tmp_path):
    """The rows begin near 4 nats: from above, one side pushes no more, and both sides bring the loss down."""

    def losses(two_sided):
        args = settings(tmp_path / str(two_sided), max_steps=8, learning_rate=1e-2)
        trainer = train(args, FORGET, FORGET[:1], forget_objective=TargetLoss(2.5, two_sided), rule=Sum(1.0, 0.0))
        return [entry["loss/forget"] for entry in training_logs(trainer)]

    pulled = losses(True)
    assert pulled[-1] < 0.5 * pulled[0]
    with pytest.raises(RuntimeError, match="Nothing was trained"):
        losses(False)


def test_the_level_is_in_the_record_of_a_training(tmp_path):
    args = settings(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=1, forget_level=5.0)
    train(args, FORGET, RETAIN)
    args = settings(tmp_path / "b", max_steps=2, forget_level=6.0)
    with pytest.raises(ValueError, match=r"level=5\.0.*level=6\.0|forget_objective"):
        BLURTrainer(tiny_llama(), args, FORGET, RETAIN).train(str(tmp_path / "a" / "checkpoint-1"))
