"""`recommended`: the settings of `unlearn` for a training of one's own are those that `unlearn` derives."""

from dataclasses import fields

import pytest
from support.own_data import TEMPLATE, own_sets
from support.tiny_tokenizer import CHAT_TEMPLATE

import blur_trainer as bt
from blur_trainer.pipeline.methods import DISTILL, METHODS
from blur_trainer.pipeline.preparing import prepare
from blur_trainer.pipeline.steering import with_steering
from blur_trainer.pipeline.unlearn import measured_level
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.toy.model import tiny_llama, train_tokenizer

SETS = own_sets()


@pytest.fixture(scope="module", params=[None, CHAT_TEMPLATE], ids=["plain", "chat"])
def model(request, tmp_path_factory):
    """It knows nothing, which is enough for its settings."""
    folder = tmp_path_factory.mktemp("recommended")
    tokenizer = train_tokenizer([TEMPLATE.format(**row) for row in SETS["forget"]], vocab_size=400)
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer, hidden_size=16, num_layers=2, num_heads=2).save_pretrained(folder)
    return str(folder)


def prepared(model, tmp_path, **options):
    given = {"model_name_or_path": model, "forget": SETS["forget"], "retain": SETS["retain"], "use_cpu": True}
    return prepare({**given, "output_dir": str(tmp_path / "out"), **options})


@pytest.mark.parametrize(
    "method",
    [m if m in ("blur", "npo", "uld") else pytest.param(m, marks=pytest.mark.full) for m in METHODS if m != DISTILL],
)
def test_they_are_those_of_unlearn(model, tmp_path, method):
    found = bt.recommended(model, SETS["forget"], SETS["retain"], method=method, level=3.0)
    level = found.pop("forget_level", None)
    expected = prepared(model, tmp_path, method=method)
    expected = with_steering(expected, ModelLoader(expected.args, expected.model_args)(model))
    assert found == expected.settings and level == (3.0 if METHODS[method].leveled else None)
    args = METHODS[method].trainer.config_class(str(tmp_path / "out"), use_cpu=True, **found)
    ours, theirs = ({f.name: getattr(each, f.name) for f in fields(each)} for each in (args, expected.args))
    ours.pop("logging_dir", None), theirs.pop("logging_dir", None)  # has the time in it
    assert ours == theirs


def test_an_adapter_has_another_rate(model, tmp_path):
    found = bt.recommended(model, SETS["forget"], SETS["retain"], level=3.0, lora=True)
    assert found["learning_rate"] == prepared(model, tmp_path, use_peft=True).settings["learning_rate"]
    assert found["learning_rate"] != bt.recommended(model, SETS["forget"], SETS["retain"], level=3.0)["learning_rate"]


def test_the_level_is_measured_as_unlearn_does(model, tmp_path):
    found = bt.recommended(model, SETS["forget"], SETS["retain"])["forget_level"]
    run = prepared(model, tmp_path)
    load = ModelLoader(run.args, run.model_args)
    assert found == pytest.approx(measured_level(run, load(model), load).nats, rel=1e-4)
    given = bt.recommended(model, SETS["forget"], SETS["retain"], level=bt.Level(2.5))["forget_level"]
    assert given == 2.5


def test_a_method_that_there_is_not(model):
    with pytest.raises(ValueError, match="`method` is 'foo': choose among blur"):
        bt.recommended(model, SETS["forget"], SETS["retain"], method="foo")
    with pytest.raises(OSError, match=r"Cannot load model '\./nowhere': there is no folder"):
        bt.recommended("./nowhere", SETS["forget"], SETS["retain"])
