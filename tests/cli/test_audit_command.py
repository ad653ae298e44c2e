"""`blur-trainer audit`: what it prints and writes, what it refuses, and whether a certificate is of a model."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM

from blur_trainer.cli.audit import AuditArguments
from blur_trainer.cli.main import main
from blur_trainer.pipeline.audit_attacks import outside
from blur_trainer.pipeline.measure import MeasureArguments


@pytest.fixture
def here(folder, monkeypatch):
    """In the folder of the files; two attacks, and no figures."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])
    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", lambda world: outside(world)[:2])


def test_a_model_is_audited_and_its_certificate_checked(here, tmp_path, capsys):
    words = ["audit", "model", "--forget", "forget.csv", "--unseen", "unseen.jsonl", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "forget: forget.csv: 8 rows" in told.err and "seconds, about" in told.err
    content = json.loads((tmp_path / "audit.json").read_text())
    for one in content["attacks"]:
        (row,) = [line for line in told.out.splitlines() if line.startswith(one["name"])]
        assert f"{one['numbers']['rouge']:.3f}" in row
    assert content["sentence"] in told.out and (tmp_path / "report.html").is_file()
    assert all(f"  {what}\n" in told.out for what in content["left_out"])
    page = (tmp_path / "report.html").read_text()
    assert "difference at least" in page and "trainer_state.json:" not in page, "nothing was trained"
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["settings"]["audit"] == content["sentence"]
    assert main([*words, "--require", "no_recovery"]) == int(content["sentence"].startswith("recovered by"))
    assert "seconds, about" not in capsys.readouterr().err, "all was done already"

    shutil.copytree("model", tmp_path / "copy")
    again = [*words[:1], str(tmp_path / "copy"), *words[2:]]
    assert main([*again, "--card", "true"]) == 0 and "| plain question | rouge |" in card_of(tmp_path / "copy")
    check = ["--check", str(tmp_path / "audit.json")]
    assert main(["audit", "model", *check, "--forget", "forget.csv"]) == 0
    assert "is of this model and these data." in capsys.readouterr().out
    assert main(["audit", "model", *check, "--forget", "retain.jsonl"]) == 1
    assert "is not of this: the rows of `forget` differ" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert main(["audit", str(tmp_path / "other"), *check]) == 1
    assert "the weights differ" in capsys.readouterr().out


def card_of(folder):
    return (folder / "README.md").read_text()


def test_require_makes_the_exit_code(here, tmp_path, monkeypatch, capsys):
    def found(world):
        (plain, _), run = outside(world)[:2], outside(world)[0].run
        return [type(plain)(plain.name, plain.kind, {}, plain.cost, lambda w: {**run(w), "recovered": True})]

    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", found)
    words = ["audit", "model", "--forget", "forget.csv", "--output_dir", str(tmp_path)]
    assert main([*words, "--require", "no_recovery"]) == 1
    assert "recovered by: plain question" in capsys.readouterr().out
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--forget", "forget.csv"], "Give `output_dir`"),
        (["model", "--output_dir", "out"], "Give `model_name_or_path` (the model) and `forget`"),
        (["--check", "audit.json"], "Give the model beside `check`"),
        (["me/x", "--card", "true", "--forget", "f.csv", "--output_dir", "o"], "`card` writes into the folder"),
        (["model", "--check", "nowhere.json"], "nowhere.json"),
        (["model", "--check", "forget.csv"], "forget.csv is no certificate of an audit"),
        (["model", "--forget", "forget.csv", "--output_dir", "out", "--budget", "days"], "invalid choice: 'days'"),
        (["model", "--forget", "forget.csv", "--output_dir", "out", "--seed", "-1"], "`seed` must be"),
        (["model", "--forget", "forget.csv", "--bugdet", "hours"], "Did you mean `budget`?"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(refused, words, message):
    assert message in refused("audit", *words)


def test_help_is_one_screen(capsys):
    assert main(["audit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    for each in (*fields(MeasureArguments), *fields(AuditArguments)):
        assert any(line.strip().startswith(f"--{each.name}") for line in lines), each.name
