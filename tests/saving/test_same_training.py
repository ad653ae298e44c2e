"""A checkpoint is continued only by the training that wrote it, and only if every byte of it is as it was saved."""

import json
import logging
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.cases import every
from support.models import examples, tiny_llama
from support.runs import distance, settings, weights

from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.saving.manifest import MANIFEST_NAME
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.record import describe, model_record, settings_record

FORGET, RETAIN = examples(4), examples(3, 1)
CONFIG = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
STATE = ("scheduler.pt", "rng_state.pth", "training_args.bin", "config.json")


def make(folder, model=None, forget=FORGET, retain=RETAIN, config=None, **kwargs):
    return BLURTrainer(model or tiny_llama(), settings(folder, **(CONFIG | (config or {}))), forget, retain, **kwargs)


def lora(**kwargs):
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | kwargs))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished training, its checkpoints 1 and 2, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.fixture
def run(done, tmp_path):
    """A folder with its first checkpoint only."""
    shutil.copytree(done[0] / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    return tmp_path / "run"


# ---- damage ----


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "half of the weights is zero": ("model.safetensors", lambda c: c[: len(c) // 2] + bytes(len(c) - len(c) // 2)),
    "the last bit of the weights": ("model.safetensors", lambda c: flipped(c, len(c) - 1)),
    "the header of the weights": ("model.safetensors", lambda c: flipped(c, 20)),
    "cut weights": ("model.safetensors", lambda c: c[:-100]),
    "a bit of the moments": ("optimizer.pt", lambda c: flipped(c, len(c) // 2)),
    "cut moments": ("optimizer.pt", lambda c: c[: len(c) // 2]),
    "no moments": ("optimizer.pt", lambda c: b""),
    **{f"a bit of {name}": (name, lambda c: flipped(c, len(c) // 2)) for name in STATE},
}


def test_damage_is_refused_by_the_name_of_the_file(run, caplog):
    trainer = make(run)

    def refused(name, damage):
        path = run / "checkpoint-1" / name
        content = path.read_bytes()
        path.write_bytes(damage(content))
        try:
            with pytest.raises(ValueError, match=f"has been changed since it was saved: '{name}' has ") as raised:
                trainer.train(resume_from_checkpoint=True)
        finally:
            path.write_bytes(content)
        assert "\n" not in str(raised.value) and "older checkpoint" in str(raised.value)

    every(DAMAGE, refused)
    assert trainer.state.global_step == 0 and distance(weights(tiny_llama()), weights(trainer.model)) == 0


def test_every_damaged_file_is_named_up_to_four(run):
    names = sorted(path.name for path in (run / "checkpoint-1").iterdir() if path.name[0] != "t")[1:]
    for name in names:
        (run / "checkpoint-1" / name).unlink()
    with pytest.raises(ValueError, match=r", \.\.\.\. Put") as raised:
        make(run).train(resume_from_checkpoint=True)
    assert [name in str(raised.value) for name in names] == [index < 4 for index in range(len(names))]


def test_what_is_whole_is_resumed_also_with_a_file_of_the_user_s(run, done, caplog):
    (run / "checkpoint-1" / "notes.txt").write_text("mine")
    trainer = make(run)
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and distance(done[1], weights(trainer.model)) == 0
    ours = [record for record in caplog.records if record.name.startswith("blur_trainer")]
    assert [record for record in ours if record.levelno >= logging.WARNING] == []


def test_a_manifest_of_an_earlier_version_is_warned_of(run, caplog):
    manifest = run / "checkpoint-1" / MANIFEST_NAME
    files = {name: entry["bytes"] for name, entry in json.loads(manifest.read_text())["files"].items()}
    manifest.write_text(json.dumps({"files": files}))
    make(run, config={"gamma": 0.25}).train(resume_from_checkpoint=True)
    assert "without checksums" in caplog.text and "does not say what it was trained with" in caplog.text


def test_the_limit_of_checkpoints_is_in_the_arguments_that_are_saved(run, tmp_path):
    """Trainer must not see it while it saves, everybody else must."""
    trainer = make(tmp_path / "new", config={"save_total_limit": 1})
    trainer.train()
    saved = torch.load(tmp_path / "new" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint-2"]


# ---- another training ----


def other_model():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3] += 1e-3
    return model


CHANGED = {
    "gamma": ({"config": {"gamma": 0.2}}, ["`rule` was BLUR(", "gamma=1.0", "gamma=0.2"]),
    "rule": ({"rule": Sum()}, ["`rule` was BLUR(", "is Sum("]),
    "objective": ({"forget_objective": GradAscent()}, ["`forget_objective` was NPO(beta=0.1) and is GradAscent()"]),
    "its argument": ({"forget_objective": NPO(beta=0.5)}, ["NPO(beta=0.5)"]),
    "retain objective": ({"retain_objective": KL()}, ["`retain_objective` was NLL() and is KL()"]),
    "rate": ({"config": {"learning_rate": 1e-4}}, ["`learning_rate` was 0.003 and is 0.0001"]),
    "seed": ({"config": {"seed": 7}}, ["`seed` was 42 and is 7"]),
    "batch": ({"config": {"per_device_train_batch_size": 4}}, ["`per_device_train_batch_size` was 2 and is 4"]),
    "optimizer": ({"config": {"optim": "sgd"}}, ["`optim` was adamw_torch", "is sgd"]),
    "forget set": ({"forget": examples(4, 9)}, ["the forget set was 4 examples (", "is 4 examples ("]),
    "its order": ({"forget": FORGET[::-1]}, ["the forget set"]),
    "its labels": ({"forget": [r | {"labels": r["input_ids"]} for r in FORGET]}, ["the forget set"]),
    "retain set": ({"retain": RETAIN[:2]}, ["the retain set was 3 examples (", "is 2 examples ("]),
    "swapped": ({"forget": RETAIN, "retain": FORGET}, ["forget set and retain set are swapped"]),
    "model": ({"model": tiny_llama(1)}, ["the starting model"]),
    "one row of one matrix": ({"model": other_model()}, ["the starting model"]),
    "its precision": ({"model": tiny_llama().bfloat16()}, ["the starting model"]),
    "parameters": ({"config": {"train_layers": "1"}}, ["`trained parameters`", "training 9 of 21"]),
    "an adapter": ({"peft_config": lora()}, ["the adapter was none and is LORA"]),
    "two": ({"rule": Sum(), "config": {"seed": 7}}, ["`rule`", "`seed`"]),
}


def test_another_training_is_refused_by_what_differs(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(kwargs, words):
        trainer = make(run, **kwargs)
        with pytest.raises(ValueError, match="checkpoint-1' is of another training: ") as raised:
            trainer.train(resume_from_checkpoint=True)
        message = str(raised.value)
        assert [word for word in (*words, "`output_dir`") if word not in message] == [] and "\n" not in message
        assert trainer.state.global_step == 0

    every(CHANGED, refused)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_adapter_is_compared_by_its_settings_and_its_base(tmp_path):
    make(tmp_path, peft_config=lora()).train()
    shutil.rmtree(tmp_path / "checkpoint-2")

    def refused(words, model=None, **changed):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, model, peft_config=lora(**changed)).train(resume_from_checkpoint=True)

    cases = {
        "modules": lambda: refused("the adapter's `target_modules` was", target_modules=["k_proj", "v_proj"]),
        "alpha": lambda: refused("the adapter's `lora_alpha` was 8 and is 16", lora_alpha=16),
        "rank": lambda: refused("the adapter's `r` was 2 and is 4", r=4),
        "base": lambda: refused("the starting model was", tiny_llama(1)),
    }
    every({name: (case,) for name, case in cases.items()}, lambda case: case())
    make(tmp_path, peft_config=lora(target_modules=["v_proj", "q_proj"])).train(resume_from_checkpoint=True)


def test_an_adapter_that_was_drawn_anew_is_warned_of(tmp_path, caplog):
    def drawn(seed):
        model = tiny_llama()
        torch.manual_seed(seed)
        return get_peft_model(model, lora())

    make(tmp_path, drawn(0), config={"max_steps": 1}).train()
    trainer = make(tmp_path, drawn(1))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert "the adapter before training was" in caplog.text and "`max_steps` was 1 and is 2" in caplog.text


def test_what_may_change_is_named_and_taken(run, caplog):
    trainer = make(run, config={"max_steps": 3, "max_grad_norm": 0.5, "logging_steps": 3, "save_strategy": "no"})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    (line,) = [r.getMessage() for r in caplog.records if "with other settings" in r.getMessage()]
    assert "`max_steps` was 2 and is 3" in line and "`max_grad_norm` was 1.0 and is 0.5" in line
    assert "logging" not in line and "save" not in line and "\n" not in line


# ---- what is recorded ----


def test_values_are_described_alike_in_every_process():
    def same(one, other):
        assert describe(one) == describe(other)
        assert json.loads(json.dumps(describe(one))) == describe(one)

    cases = {
        "functions": (lambda g: g, lambda g: g),
        "sets": ({"b", "a"}, {"a", "b"}),
        "mappings": ({"b": 1, "a": {2, 1}}, {"a": {1, 2}, "b": 1}),
        "rules": (BLUR(gamma=0.5), BLUR(gamma=0.5)),
        "modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    }
    every(cases, same)
    assert len({describe(value) for value in (BLUR(), BLUR(clamp=True), Sum(), 1, 1.5, "1", None)}) == 7


def test_sets_are_digested_by_content_not_by_how_they_are_kept(tmp_path):
    """Slices, concatenations, integer types; a stream cannot be known without reading it."""
    rows = datasets.Dataset.from_list(FORGET)
    small = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in rows.column_names})
    parts = datasets.concatenate_datasets([rows.select([0, 1]), rows.select([2, 3])])

    def recorded(forget, retain=None):
        class Pair:
            pass

        pair = Pair()
        pair.forget, pair.retain = forget, retain
        record = settings_record(settings(tmp_path), pair, {}, 1, {"fixed": {}, "free": {}})
        return record["fixed"]["the forget set"], record["fixed"]["the retain set"]

    plain, none = recorded(rows)
    assert none == "none" and recorded(rows, rows) == (plain, plain)
    for other in (parts, rows.cast(small), rows.select(range(4)), rows.add_column("ref_logps", [0.5] * 4)):
        assert recorded(other)[0] == plain
    for other in (rows.select([1, 0, 2, 3]), rows.select([0, 1, 2]), rows.add_column("x", [{"a": [1]}] * 4)):
        assert recorded(other)[0] != plain
    joined = [{"input_ids": FORGET[0]["input_ids"] + FORGET[1]["input_ids"], "labels": []}]
    split = [{"input_ids": FORGET[i]["input_ids"], "labels": []} for i in (0, 1)]
    assert recorded(datasets.Dataset.from_list(joined)) != recorded(datasets.Dataset.from_list(split))
    assert recorded(rows.to_iterable_dataset())[0] == "unknown"


def test_the_starting_model_is_a_sample_of_each_tensor_of_every_type():
    model = torch.nn.ParameterList([torch.randn(1000, 300), torch.randn(7).bfloat16(), torch.zeros(0), torch.ones(())])
    before = model_record(model)
    assert model_record(model) == before and before["fixed"]["the adapter"] == "none"
    with torch.no_grad():
        model[0][:, 17] += 1.0  # one column
        assert model_record(model) != before
        model[0][:, 17] -= 1.0
        model[1][3] += 1.0
    assert model_record(model) != before
