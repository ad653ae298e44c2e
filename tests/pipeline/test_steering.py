"""Where RMU steers is decided by the own words' share, unless somebody has decided."""

import pytest
from support.models import tiny_llama
from support.own_data import own_sets
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.pipeline import steering
from blur_trainer.pipeline.preparing import prepare
from blur_trainer.pipeline.steering import OWN_SHARE, with_steering

SETS = own_sets()


@pytest.fixture
def prepared(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")

    def made(**options):
        sets = {name: SETS[name] for name in ("forget", "retain")}
        given = {"model_name_or_path": str(tmp_path / "model"), "use_cpu": True, "output_dir": str(tmp_path / "out")}
        return prepare({**given, **sets, **options})

    return made


@pytest.fixture
def share(monkeypatch):
    def of(value):
        monkeypatch.setattr(steering, "own_share", lambda *args, **how: value)

    return of


@pytest.mark.parametrize("value", [None, 0.5, OWN_SHARE - 0.01])
def test_whole_answers_where_more_than_own_words_is_missed(prepared, share, value, capsys):
    share(value)
    run = with_steering(prepared(), None)
    expected = {"layer": 1, "skip_shared_start": True, "answers_only": True}
    assert run.settings["forget_objective_kwargs"] == run.args.forget_objective_kwargs == expected
    assert not run.args.level_two_sided and "level_two_sided" not in run.settings
    said = capsys.readouterr().err
    assert ("Steering" in said) == (value is not None)
    assert value is None or f"Steering whole answers: own words carry {value:.2f} of what" in said


@pytest.mark.parametrize("method", ["blur", "rmu"])
def test_own_words_where_little_else_is_missed(prepared, share, method, capsys):
    share(OWN_SHARE)
    run = with_steering(prepared(method=method), None)
    expected = {"layer": 1, "skip_shared_start": True, "own_words": True}
    assert run.settings["forget_objective_kwargs"] == run.args.forget_objective_kwargs == expected
    assert run.args.level_two_sided and run.settings["level_two_sided"]
    assert "Steering only the own words of answers: they carry 0.67 of what" in capsys.readouterr().err
    assert with_steering(run, None) is run, "it is decided"
    again = prepared(method=method, derived=run.settings)
    assert with_steering(again, None) is again, "a run.yaml has it"


def test_what_was_given_stays(prepared, share):
    share(1.0)
    run = with_steering(prepared(level_two_sided=False), None)
    assert run.args.forget_objective_kwargs["own_words"] and not run.args.level_two_sided
    for options in (
        {"forget_objective_kwargs": {"layer": 0}},
        {"forget_objective": "npo", "retain_objective": "nll"},
        {"method": "npo"},
        {"method": "blur-target"},
    ):
        given = prepared(**options)
        assert with_steering(given, None) is given
