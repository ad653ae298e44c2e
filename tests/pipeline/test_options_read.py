"""The advice of a verdict names options that the run's method has and reads."""

import re
from dataclasses import replace

import pytest

from blur_trainer.pipeline.arguments import names_of
from blur_trainer.pipeline.methods import METHODS, options_read
from blur_trainer.report.verdict import judge

BEFORE = {"forget_loss": 0.1, "retain_loss": 0.2, "retain_rouge": 1.0, "hold_rouge": 1.0, "unseen_loss": 5.0}
GOOD = {**BEFORE, "forget_loss": 5.0}
ENDS = {
    "forgotten": {},
    "too little": {"forget_loss": 1.0},
    "too little, and paid for": {"forget_loss": 1.0, "hold_rouge": 0.95},
    "too far": {"forget_loss": 50.0},
    "broken": {"retain_rouge": 0.2},
    "only hold lost": {"hold_rouge": 0.2},
    "broken and too little": {"retain_rouge": 0.2, "forget_loss": 1.0},
    "broken and too far": {"retain_rouge": 0.2, "forget_loss": 50.0},
    "ruined": {"forget_loss": float("nan")},
    "unchanged": BEFORE,
}


def advised(options, **changes):
    return " ".join(judge(BEFORE, {**GOOD, **changes}, options=options).next)


@pytest.mark.parametrize("method", METHODS)
def test_advice_names_options_of_the_method(method, tmp_path):
    chosen = METHODS[method]
    args = chosen.trainer.config_class(output_dir=str(tmp_path), use_cpu=True, **chosen.settings)
    options = options_read(chosen, args)
    told = {end: set(re.findall(r"--(\w+)", advised(options, **changes))) for end, changes in ENDS.items()}
    for end, named in told.items():
        assert named <= names_of(method) - {"forget_objective"}, f"{end}: a run's objective follows from its method"
        for strength in named & {"gamma", "forget_weight"}:
            assert replace(args, **{strength: 0.77}).build_rule() != args.build_rule(), f"{strength} is not read"
        assert named or end == "forgotten"
    assert told["too little"] & {"gamma", "forget_weight"}, "a rule of these methods has a strength"


def test_what_is_so_already_is_not_advised(tmp_path):
    def options(method, **given):
        chosen = METHODS[method]
        made = chosen.trainer.config_class(output_dir=str(tmp_path), use_cpu=True, **chosen.settings | given)
        return options_read(chosen, made)

    assert "--method blur-target" in advised(options("blur"), forget_loss=50.0)
    assert "--method" not in advised(options("blur-target"), forget_loss=50.0)
    assert "--stop_at_level" in advised(options("npo"), forget_loss=50.0)
    assert "--stop_at_level" not in advised(options("undial"), forget_loss=50.0), "it does not end at a level"
    ending = options("npo", stop_at_level=True, eval_strategy="epoch")
    assert "--stop_at_level" not in advised(ending, forget_loss=50.0)
    other = options("npo", rule="pcgrad")
    assert "weight of forgetting" not in advised(other, forget_loss=1.0), "this rule has none"
