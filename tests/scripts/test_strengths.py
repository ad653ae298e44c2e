"""The strength of every method: it is one of its settings, and the command line of a run takes it."""

import pytest

from blur_trainer.scripts import tofu, wmdp
from blur_trainer.scripts.strengths import strength_of

METHODS = [(tofu, method) for method in tofu.METHODS] + [(wmdp, method) for method in wmdp.METHODS]


@pytest.mark.parametrize(("script", "method"), METHODS, ids=[f"{s.__name__[-4:]}-{m}" for s, m in METHODS])
def test_a_run_takes_its_strength(script, method):
    given, strength = ["--method", method, "--use_cpu", "True"], strength_of(method)
    args = script.parse(given)[1]
    value = strength.scaled(args, 3)
    assert value == pytest.approx(strength.of(args) / 3 if method == "pdu" else strength.of(args) * 3)
    again = script.parse([*given, *strength.flags(args, value)])[1]
    assert strength.of(again) == strength.of(strength.put(args, value)) == value
    assert strength.of(args) != value, "the arguments themselves were changed"


def test_the_rest_of_a_rules_arguments_stays():
    args = tofu.parse(["--method", "pdu", "--use_cpu", "True", "--rule_kwargs", '{"epsilon": 0.5, "initial": 60}'])[1]
    [flag] = strength_of("pdu").flags(args, 20.0)
    assert flag == '--rule_kwargs={"epsilon": 0.5, "initial": 20.0}'
    args.rule_kwargs = {"epsilon": 0.5}
    with pytest.raises(ValueError, match=r"rule_kwargs=\{'epsilon': 0.5\}: add \"initial\""):
        strength_of("pdu").of(args)
