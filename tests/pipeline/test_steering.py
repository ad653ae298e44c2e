"""Where RMU steers is decided by the own words' share, unless somebody has decided."""

import pytest
from support.models import tiny_llama
from support.own_data import own_sets
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.evaluation.own_share import OwnShare
from blur_trainer.pipeline import steering
from blur_trainer.pipeline.preparing import prepare
from blur_trainer.pipeline.steering import LEAST, OWN_SHARE, with_steering

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
def shares(monkeypatch):
    def found(values):
        return [value if isinstance(value, OwnShare) else OwnShare(value, 0.3) for value in values]

    def of(*values):
        monkeypatch.setattr(
            steering, "own_shares", lambda *args, least, **how: dict(zip(least, found(values), strict=False))
        )

    return of


@pytest.mark.parametrize("values", [(), (0.4, 0.5, OWN_SHARE - 0.01), (OwnShare(0.9, 0.55),) * 3])
def test_whole_answers_where_more_than_own_words_is_missed(prepared, shares, values, capsys):
    shares(*values)
    run = with_steering(prepared(), None)
    expected = {"layer": 1, "skip_shared_start": True, "answers_only": True}
    assert run.settings["forget_objective_kwargs"] == run.args.forget_objective_kwargs == expected
    assert not run.args.level_two_sided and "level_two_sided" not in run.settings
    said = capsys.readouterr().err
    share = values[-1] if values and isinstance(values[-1], OwnShare) else OwnShare(0.66, 0.3)
    expected = (
        f"Steering whole answers: own words are {share.tokens:.2f} of the tokens and carry {share.loss:.2f} of what"
    )
    assert expected in said if values else "Steering" not in said


@pytest.mark.parametrize("method", ["blur", "rmu"])
@pytest.mark.parametrize(("values", "least"), [((0.7, 0.8, 0.9), 0.2), ((0.5, 0.6, OWN_SHARE), 0.4)])
def test_own_words_where_little_else_is_missed(prepared, shares, method, values, least, capsys):
    shares(*values)
    run = with_steering(prepared(method=method), None)
    expected = {"layer": 1, "skip_shared_start": True, "own_words": least}
    assert run.settings["forget_objective_kwargs"] == run.args.forget_objective_kwargs == expected
    assert run.args.level_two_sided and run.settings["level_two_sided"]
    if method == "blur":
        assert run.args.gamma == run.settings["gamma"] == 0.15, "half of what whole answers take"
    share = values[LEAST.index(least)]
    expected = f"Steering only the own words of answers: they are 0.30 of the tokens and carry {share:.2f} of what"
    assert expected in capsys.readouterr().err
    assert with_steering(run, None) is run, "it is decided"
    again = prepared(method=method, derived=run.settings)
    assert with_steering(again, None) is again, "a run.yaml has it"


def test_what_was_given_stays(prepared, shares):
    shares(1.0)
    run = with_steering(prepared(level_two_sided=False, gamma=0.4), None)
    assert run.args.forget_objective_kwargs["own_words"] and not run.args.level_two_sided
    assert run.args.gamma == 0.4 and "gamma" not in run.settings
    for options in (
        {"forget_objective_kwargs": {"layer": 0}},
        {"forget_objective": "npo", "retain_objective": "nll"},
        {"method": "npo"},
        {"method": "blur-target"},
    ):
        given = prepared(**options)
        assert with_steering(given, None) is given
