"""A training without a level says what it has done to the losses: what, when not, and that it changes nothing."""

import logging
import shutil

import datasets
import pytest
from support import reference
from support.models import examples, tiny_llama
from support.runs import distance, settings, weights

from blur_trainer.gradients.rules import Sum
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.last_words import LEAST_STEPS, ROWS, LastWordsCallback, has_stream, mean_nats
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.trainer import ULDTrainer

FORGET, RETAIN = examples(6), examples(4, 1)


def make(folder, forget=FORGET, retain=RETAIN, rule=None, **config):
    args = settings(folder, **({"max_steps": LEAST_STEPS, "learning_rate": 1e-2, "logging_steps": 10} | config))
    return BLURTrainer(tiny_llama(), args, forget, retain, rule=rule or Sum(), forget_objective=GradAscent())


@pytest.fixture
def said(caplog):
    def of(trainer, level=logging.WARNING):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="blur_trainer"):
            trainer.train()
        own = [r for r in caplog.records if r.name == "blur_trainer.trainers.last_words" and r.levelno == level]
        return [record.getMessage() for record in own]

    return of


def test_what_is_said_of_a_training_that_forgot_nothing_and_of_one_that_broke(tmp_path, said):
    (idle,) = said(make(tmp_path / "idle", learning_rate=1e-6))
    assert "Of 6 forget rows and 4 retain rows, by their losses: not_forgotten: " in idle
    assert "`--learning_rate`" in idle and idle.count("nats per token") == 1 and "--gamma" not in idle
    (broken,) = said(make(tmp_path / "broken", rule=Sum(1.0, 0.0)))
    assert "by their losses: broken: retain costs" in broken


def test_advice_is_of_the_settings_that_the_training_reads(tmp_path, said):
    """The strength is that of its rule. Of a rule that was given as an object no setting is read."""

    def options(named, **how):
        args = settings(tmp_path, UnlearningConfig, rule=named)
        trainer = UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, forget_objective=GradAscent(), **how)
        found = next(c.options for c in trainer.callback_handler.callbacks if isinstance(c, LastWordsCallback))
        assert "learning_rate" in found and "forget_objective" not in found
        return found & {"gamma", "forget_weight"}

    assert options("blur") == {"gamma"} and options("sum") == {"forget_weight"}
    assert options("pcgrad") == options("blur", rule=Sum()) == set()


def test_a_training_that_forgot_and_kept_is_told_and_not_warned_of(tmp_path, said):
    model = make(tmp_path, forget=FORGET[:1], retain=[FORGET[1]], rule=Sum(0.05, 1.0), max_steps=80)
    (line,) = said(model, logging.INFO)
    assert "Of 1 forget rows and 1 retain rows: the forget set costs" in line


def test_the_losses_are_the_literal_ones():
    model = tiny_llama()
    pairs = [reference.row_log_prob(model, row) for row in FORGET]
    assert mean_nats(model, FORGET) == pytest.approx(-sum(p.item() / n for p, n in pairs) / 6, rel=1e-5)


def test_the_training_is_the_same_with_and_without(tmp_path):
    speaks, silent = make(tmp_path / "a"), make(tmp_path / "b")
    silent.remove_callback(LastWordsCallback)
    speaks.train(), silent.train()
    assert distance(weights(speaks.model), weights(silent.model)) == 0
    keys = ("loss", "loss/forget", "loss/retain", "grad/cosine")
    histories = [[[e.get(k) for k in keys] for e in t.state.log_history] for t in (speaks, silent)]
    assert histories[0] == histories[1]


def test_when_nothing_is_said(tmp_path, said):
    assert said(make(tmp_path / "short", max_steps=LEAST_STEPS - 1, learning_rate=1e-6)) == []
    how = {"learning_rate": 1e-6, "max_steps": LEAST_STEPS + 2, "save_strategy": "steps", "save_steps": LEAST_STEPS}
    (_,) = said(make(tmp_path / "saved", **how))
    shutil.rmtree(tmp_path / "saved" / f"checkpoint-{LEAST_STEPS + 2}")
    resumed = make(tmp_path / "saved", **how)
    resumed.train(resume_from_checkpoint=True)
    speaker = next(c for c in resumed.callback_handler.callbacks if isinstance(c, LastWordsCallback))
    assert speaker._before == {}


def test_a_stream_a_level_and_an_assistant_have_none(tmp_path):
    def speaks(trainer):
        return any(isinstance(c, LastWordsCallback) for c in trainer.callback_handler.callbacks)

    stream = datasets.Dataset.from_list(FORGET).to_iterable_dataset()
    assert speaks(make(tmp_path / "rows"))
    assert not speaks(make(tmp_path / "stream", forget=stream))
    assert not speaks(make(tmp_path / "level", forget_level=4.0))
    assert not ULDTrainer.speaks_of_losses
    assert has_stream(({"a": FORGET, "b": stream}, RETAIN)) and not has_stream((FORGET, {"a": RETAIN}))


def test_of_many_rows_a_few_are_measured(tmp_path):
    trainer = make(tmp_path, forget=examples(100))
    trainer.train()
    speaker = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LastWordsCallback))
    assert len(speaker._rows["forget"]) == ROWS and len(speaker._rows["retain"]) == 4
