"""Types and ranges of settings: `blur_trainer.checks`, and the table of every trainer."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from support.cases import every
from support.runs import settings

from blur_trainer.checks import check_fields, within
from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.preference import NPO, SimNPO
from blur_trainer.trainers.blur import BLURConfig
from blur_trainer.trainers.grad_diff import GradDiffConfig
from blur_trainer.trainers.ranges import RANGES
from blur_trainer.uld.trainer import ULDConfig


@dataclass
class Settings:
    rate: Any = 0.1
    count: Any = 1
    share: Any = None
    on: Any = False
    name: Any = "a"
    side: Any = "left"
    other: Any = None

    __annotations__ = {
        **{"rate": float, "count": int, "share": float | None, "on": bool, "name": str},
        **{"side": Literal["left", "right", False], "other": dict[str, Any] | None},
    }


RIGHT = [
    *({"rate": 1}, {"rate": np.float32(0.5)}, {"count": np.int64(3)}, {"share": None}, {"share": 0.0}, {"on": True}),
    *({"side": "right"}, {"side": False}, {"other": 3}, {"name": ""}, {"rate": float("inf")}),
]
WRONG = [
    ({"rate": "0.1"}, TypeError, "`rate` must be a number, got '0.1'. It is a text: leave the quotes out."),
    ({"rate": True}, TypeError, "`rate` must be a number, got True."),
    ({"rate": None}, TypeError, "`rate` must be a number, got None."),
    ({"rate": float("nan")}, ValueError, "`rate` must be a number, got nan."),
    ({"count": 1.0}, TypeError, "`count` must be a whole number, got 1.0."),
    ({"count": True}, TypeError, "`count` must be a whole number, got True."),
    ({"count": 0}, ValueError, "`count` must be a number of at least 1, got 0."),
    ({"share": 1.0}, ValueError, "`share` must be a number of at least 0 and below 1, got 1.0."),
    ({"share": "x"}, TypeError, "`share` must be a number or None, got 'x'."),
    ({"on": "False"}, TypeError, "`on` must be True or False, got 'False'."),
    ({"on": 0}, TypeError, "`on` must be True or False, got 0."),
    ({"name": 3}, TypeError, "`name` must be a text, got 3."),
    ({"side": "up"}, ValueError, "`side` must be 'left' or 'right' or False, got 'up'."),
    ({"side": 0}, TypeError, "`side` must be 'left' or 'right' or False, got 0."),
]


def test_types_and_ranges_of_fields():
    ranges = {"count": "[1, inf)", "share": "[0, 1)"}
    every(RIGHT, lambda given: check_fields(Settings(**given), ranges))

    def check(given, error, message):
        with pytest.raises((TypeError, ValueError)) as raised:
            check_fields(Settings(**given), ranges, owner="Owner")
        assert type(raised.value) is error
        assert str(raised.value).startswith(f"Owner: {message}")

    every(WRONG, check)


def test_ends_of_an_interval():
    inside = [(0, "[0, 1]"), (1, "[0, 1]"), (0.5, "(0, 1)"), (1e300, "[0, inf)"), (float("inf"), "[0, inf]")]
    outside = [
        (0, "(0, 1]"),
        (1, "[0, 1)"),
        (-1e-9, "[0, 1]"),
        (float("inf"), "[0, inf)"),
        (float("nan"), "[-inf, inf]"),
    ]
    assert [within(*case) for case in inside] == [True] * len(inside)
    assert [within(*case) for case in outside] == [False] * len(outside)


def just_outside(interval):
    """The numbers nearest to an interval that are not in it."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    below = low if interval[0] == "(" else low - 1
    above = high if interval[-1] == ")" else high + 1
    return [value for value in (below, above) if not within(value, interval)]


def test_every_range_of_a_training_is_kept(tmp_path):
    """Each setting of the table, as a text, as `True`, as NaN, just outside its range; in the config that has it."""
    cases = []
    for name, interval in RANGES.items():
        config = ULDConfig if name == "num_assistant_layers" else BLURConfig
        whole = next(field for field in fields(config) if field.name == name).type in (int, int | None)
        cases += [(config, name, wrong) for wrong in ("1", True, float("nan"), *just_outside(interval))]
        cases += [(config, name, int(wrong)) for wrong in just_outside(interval) if whole and abs(wrong) < 2**40]

    def check(config, name, wrong):
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            config(str(tmp_path / "out"), **{"use_cpu": True, name: wrong})

    every(cases, check)
    assert not (tmp_path / "out").exists()


WRONG_SETTINGS = [
    *({"gamma": "0.1"}, {"gamma": True}, {"per_device_train_batch_size": 0}, {"learning_rate": float("nan")}),
    *({"precompute_ref_logps": "False"}, {"max_skipped_steps": float("nan")}, {"learning_rate": "1e-5"}),
    *({"max_steps": 0}, {"max_steps": -2}, {"num_train_epochs": 0}, {"num_train_epochs": -1}, {"lower_level": "up"}),
    *({"gradient_accumulation_steps": -1}, {"gradient_accumulation_steps": 2.0}, {"bf16": "yes"}, {"seed": -1}),
    *({"max_grad_norm": -1.0}, {"topics": {"a": {"alpha": True}}}, {"topics": {"a": {"max_length": 2.5}}}),
    *({"topics": {"a": {"coefficient": float("nan")}}}, {"qa_template": None}, {"rule": 3}),
]


def test_settings_of_another_type_or_out_of_range(tmp_path):
    def check(wrong):
        with pytest.raises((TypeError, ValueError)) as raised:
            settings(tmp_path / "out", **({"max_steps": -1} | wrong))
        assert next(iter(wrong)) in str(raised.value)
        assert "\n" not in str(raised.value)

    every([(wrong,) for wrong in WRONG_SETTINGS], check)


def test_what_trainer_takes_is_taken(tmp_path):
    """Whole numbers for fractions, a `Path`, Trainer's own abbreviations."""
    args = GradDiffConfig(
        Path(tmp_path), learning_rate=1, warmup_steps=0, save_steps=0.5, eval_steps=None, use_cpu=True
    )
    assert (args.output_dir, args.learning_rate) == (str(tmp_path), 1)
    assert BLURConfig(str(tmp_path), max_steps=3, num_train_epochs=0, use_cpu=True).max_steps == 3


def test_arguments_of_rules_and_objectives():
    wrong = [
        (BLUR, {"gamma": "0.1"}), (BLUR, {"alpha": True}), (BLUR, {"clamp": 1}), (BLUR, {"lower_level": "both"}),
        (Sum, {"retain_weight": None}), (Sum, {"forget_weight": float("inf")}), (NPO, {"beta": True}),
        (SimNPO, {"delta": "0"}), (ActivationMatch, {"layer": True}), (ActivationMatch, {"masked": "no"}),
    ]  # fmt: skip

    def check(kind, given):
        with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: `{next(iter(given))}`"):
            kind(**given)

    every(wrong, check)
