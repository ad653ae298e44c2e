"""`--optuna`: what is searched and minimized, what a search leaves, and that the run trains with the best settings."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from support.own_data import write_own_data
from transformers import TrainerControl, TrainerState

import blur_trainer as bt
from blur_trainer.pipeline import search as searching
from blur_trainer.pipeline.preparing import prepare
from blur_trainer.pipeline.search import Goal, search, searched, unreported

SHORT = {"num_train_epochs": 1, "replay": 8, "disable_tqdm": True, "use_cpu": True, "eval_rows": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_own_data(folder, epochs=2)
    return folder


@pytest.fixture
def options(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    sets = {"model_name_or_path": "model", "forget": "forget.csv", "retain": "retain.jsonl"}
    return {**sets, "output_dir": str(tmp_path / "out"), "optuna": 2, **SHORT}


def goal(level=2.0, before=0.5, rise=0.5):
    check = SimpleNamespace(level=level, paid=lambda found: found["retain_loss"] - before)
    return Goal(check, rise, {})


def test_what_is_minimized():
    assert goal()({"forget_loss": 0.0, "retain_loss": 0.5}) == 1.0, "knows it by heart"
    assert goal()({"forget_loss": 2.0, "retain_loss": 0.1}) == 0.0, "a better retain loss is no gain"
    assert goal()({"forget_loss": 3.0, "retain_loss": 0.5}) == 0.5, "too much counts as too little does"
    assert goal()({"forget_loss": 2.0, "retain_loss": 1.0}) == 1.0, "the verdict's bound"


def test_rows_of_a_search_are_not_those_of_the_verdict_if_there_are_enough():
    rows, said = unreported(36, 20)
    assert len(rows) == 16 and "the 16 rows that the verdict does not report" in said
    assert {0, 35}.isdisjoint(rows), "the first and the last are reported"
    assert unreported(35, 20)[0] == list(range(0, 35, 2)) == unreported(35, 200)[0]


def test_the_last_weights_of_a_trial_are_measured():
    control = TrainerControl()
    for step in (1, 2):
        assert not control.should_evaluate
        searching._AtTheEnd().on_step_end(None, TrainerState(global_step=step, max_steps=2), control)
    assert control.should_evaluate


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, {"gamma": (0.03, 3.0), "learning_rate": (2.5e-4, 4e-3)}),
        ({"learning_rate": 0.1}, {"gamma": (0.03, 3.0)}),
        ({"method": "npo"}, {"forget_weight": (0.1, 10.0), "learning_rate": (2.5e-4, 4e-3)}),
        ({"method": "undial"}, {"learning_rate": (2.5e-4, 4e-3)}),
        ({"method": "npo", "rule": "pcgrad"}, {"learning_rate": (2.5e-4, 4e-3)}),
    ],
    ids=["blur", "a rate is given", "a sum", "no weight moves it", "a rule without a weight"],
)
def test_what_was_not_given_is_searched(options, given, bounds):
    found = searched(prepare({**options, **given}))
    assert found.keys() == bounds.keys()
    assert all(found[name] == pytest.approx(ends) for name, ends in bounds.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optuna": 0}, "`optuna`"),
        ({"method": "uld"}, "`optuna` is not for uld"),
        ({"gamma": 0.1, "learning_rate": 0.1}, "leave `learning_rate` or `gamma` out"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_model_is_loaded(options, monkeypatch, given, message):
    monkeypatch.setattr("blur_trainer.pipeline.unlearn.ModelLoader", lambda *_: pytest.fail("a model is loaded"))
    own = {**options, **given}
    sets = [own.pop(name) for name in ("model_name_or_path", "forget", "retain", "output_dir")]
    with pytest.raises(ValueError, match=message):
        bt.unlearn(*sets, **own)


def test_a_missing_optuna_says_what_to_install(options, monkeypatch):
    monkeypatch.setattr(searching, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'blur_trainer\[optuna\]'"):
        searched(prepare(options))


def test_several_processes_are_refused(options, monkeypatch):
    monkeypatch.setattr(searching, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="one process"):
        searched(prepare(options))


def test_a_run_searches_and_trains_with_the_best_settings(options, tmp_path, monkeypatch):
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", lambda out: out / "report.html")
    options |= {"level": "8", "thresholds": {"loss_rise": 100.0}}  # so the second trial, of a higher rate, is better
    sets = [options.pop(name) for name in ("model_name_or_path", "forget", "retain", "output_dir")]
    done = bt.unlearn(*sets, **options)
    out = done.output_dir
    trials = json.loads((out / "trials.json").read_text(encoding="utf-8"))
    first, second = trials["trials"]
    assert (first["learning_rate"], first["gamma"]) == (1e-3, 0.3), "the first one has the settings as derived"
    assert trials["best"]["learning_rate"] == second["learning_rate"] != 1e-3 and 0.03 <= second["gamma"] <= 3.0
    for each in trials["trials"]:
        rise = max(0.0, each["retain_loss"] - trials["retain_before"]) / trials["loss_rise"]
        missing = abs(each["forget_loss"] - trials["level"]) / trials["level"]
        assert each["minimized"] == pytest.approx(missing + rise)
    best = min(trials["trials"], key=lambda each: each["minimized"])
    assert trials["best"] == {name: best[name] for name in ("gamma", "learning_rate")}
    file = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))
    assert "optuna" not in file and trials["best"].items() <= file["derived"].items()
    stored = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["settings"]
    assert stored["learning_rate"] == best["learning_rate"] and stored["optuna"] == 2
    assert (out / "replay.json").is_file() and not (out / "trials").exists()
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    rates = [each["learning_rate"] for each in state["log_history"] if "learning_rate" in each]
    assert rates[0] == best["learning_rate"], "the training has it, too"

    resumed = prepare({**options, "model_name_or_path": sets[0], "forget": sets[1], "retain": sets[2],
                       "output_dir": sets[3], "resume_from_checkpoint": True})  # fmt: skip
    again = search(resumed, goal(), out, lambda *_, **__: pytest.fail("a search that had ended begins again"))
    assert trials["best"].items() <= again.settings.items()
    assert again.args.learning_rate == best["learning_rate"] and again.args.gamma == best["gamma"]
    assert replace(again, args=None, settings=None) == replace(resumed, args=None, settings=None)
