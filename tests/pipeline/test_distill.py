"""`distill`: what a composed model says, written into ordinary weights."""

import json

import pytest
from safetensors.torch import load_file
from support.models import examples, tiny_llama
from support.own_data import write_own_data
from support.runs import settings
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import blur_trainer as bt
from blur_trainer.cli.main import main
from blur_trainer.pipeline.preparing import prepare

SETS = {"forget": "forget.csv", "retain": "retain.jsonl"}


def sets_of(folder):
    return {role: bt.read_rows(folder / name, role=role, has_template=False).dataset for role, name in SETS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Own data, a model that knows them, and what ULD made of it."""
    at = tmp_path_factory.mktemp("own")
    write_own_data(at)
    args = bt.ULDConfig(
        str(at / "composed"), num_assistant_layers=1, num_train_epochs=30, learning_rate=1e-2, weight=-2.0,
        use_cpu=True, max_length=64, disable_tqdm=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = bt.ULDTrainer(
        str(at / "model"), args, *sets_of(at).values(),
        augment_forget="none", augment_retain="none",
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return at


def test_the_weights_forget_as_the_composed_model_does(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", lambda out: out / "report.html")
    words = [*(f"--{role}={name}" for role, name in SETS.items()), "--output_dir", str(tmp_path / "out")]
    short = ["--num_train_epochs", "20", "--replay", "0", "--disable_tqdm", "true"]
    assert main(["distill", "composed", *words, *short]) == 0
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["rows"]
    losses = {row["name"]: row["metrics"]["forget_loss"] for row in rows}
    kept = {row["name"]: row["metrics"]["retain_loss"] for row in rows}
    assert list(losses) == ["before", "composed", "Distilled"]
    assert losses["before"] < 0.2 and losses["composed"] > 1.0, losses
    assert losses["Distilled"] > 1.0 and kept["Distilled"] < kept["composed"], (losses, kept)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is LlamaForCausalLM
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and any(not value.equal(after[name]) for name, value in before.items())


def test_settings_are_those_of_the_target(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    given = {
        "model_name_or_path": "composed",
        "method": "distill",
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    prepared = prepare({**SETS, **given})
    assert prepared.teacher == "composed" and prepared.model_args.model_name_or_path == str(folder / "model")
    assert bt.recommended("composed", *sets_of(folder).values(), method="distill") == prepared.settings


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("model", [], "'model' is a 'llama': its weights are ordinary already"),
        ("composed", ["--model_revision", "v2"], "leave `model_revision` out"),
        ("nowhere", [], "Cannot load model 'nowhere'"),
    ],
)
def test_what_cannot_be_distilled_is_said_before_anything_is_trained(folder, model, more, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = [f"--{role}={name}" for role, name in SETS.items()]
    assert main(["distill", model, *words, *more, "--output_dir", "never"]) == 2
    said = capsys.readouterr().err
    assert message in said and "blur-trainer distill: " in said
    assert not (folder / "never").exists()


def test_the_objective_needs_another_model(tmp_path):
    args = settings(tmp_path, bt.UnlearningConfig, forget_objective="distill", retain_objective="kl")
    with pytest.raises(ValueError, match="pass it as `ref_model`"):
        bt.UnlearningTrainer(tiny_llama(), args, examples(4), examples(4, seed=1))
