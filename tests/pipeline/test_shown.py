"""The settings in metrics.json: complete, plain, and without a text of the sets."""

import json
from types import SimpleNamespace

import pytest

from blur_trainer.evaluation.level import Level
from blur_trainer.pipeline.shown import shown_settings

SECRET = "the text that is to be forgotten"


def prepared(redact=False, push_to_hub=False, **options):
    args = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "per_device_train_batch_size": 8, "replay": 512}
    return SimpleNamespace(
        script=SimpleNamespace(redact=redact),
        args=SimpleNamespace(
            **args, stop_at_level=False, push_to_hub=push_to_hub, replay_kwargs={"prompts": [SECRET], "top_p": 0.5}
        ),
        model_args=SimpleNamespace(model_name_or_path="my-model"),
        method=SimpleNamespace(label="BLUR-RMU"),
        settings={"learning_rate": 1e-3, "gamma": 0.1, "forget_objective_kwargs": {"layer": 2}},
        options={"forget": [{"text": SECRET}], "hold": [{"text": SECRET}], "limit": 40, **options},
        sets={"forget": SimpleNamespace(said="data in memory: 1 row", digest="abcd")},
        forgotten=(),
    )


def trained(trainer=None, *notes):
    return SimpleNamespace(trainer=trainer, notes=notes)


def test_settings_are_complete_and_hold_no_text():
    found = shown_settings(prepared(callback=object, lists=[1, Level(2.0)]), Level(5.8512, "unseen"), trained())
    assert SECRET not in json.dumps(found)
    assert found["data"] == {"forget": "data in memory: 1 row; digest abcd"}
    assert found["forget_level"] == "5.851 nats per token (unseen)"
    expected = {"lr_scheduler_type": "linear", "replay": 512, "gamma": 0.1, "limit": 40, "method": "BLUR-RMU"}
    assert {name: found[name] for name in expected} == expected
    assert found["forget_objective_kwargs"] == {"layer": 2} and found["date"].endswith("UTC")
    assert "notes" not in found


@pytest.mark.parametrize("why", ["redact", "push_to_hub"])
def test_settings_that_are_given_away_let_nobody_test_a_guess(why):
    found = shown_settings(prepared(**{why: True}), Level(5.0), trained())
    assert found["data"] == {"forget": "data in memory: 1 row"}
    assert found["replay_kwargs"] == {"prompts": "<1 PROMPTS>", "top_p": 0.5}


def test_the_trainer_says_its_objectives_and_that_the_base_still_knows():
    card = {"hyperparameters": {"forget_objective": "RMU(layer=2)"}}
    trainer = SimpleNamespace(args=SimpleNamespace(stop_at_level=True, push_to_hub=False), card_info=lambda: card)
    found = shown_settings(prepared(forget_objective="rmu"), Level(5.0), trained(trainer, "The base still knows."))
    assert found["forget_objective"] == "RMU(layer=2)" and found["notes"] == ["The base still knows."]
    assert found["stop_at_level"] is True  # of the trainer, whose configuration was the last
