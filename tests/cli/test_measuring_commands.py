"""`blur-trainer evaluate`: what it prints and writes, what it refuses before anything is loaded."""

import json
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.cli.evaluate import EvaluateArguments
from blur_trainer.cli.main import main
from blur_trainer.pipeline.arguments import SetArguments, UnlearnArguments
from blur_trainer.pipeline.measure import MeasureArguments

NAMES = ["--model_name_or_path", "model", "--forget", "forget.csv"]
FEW = ["--eval_rows", "4"]


@pytest.fixture(scope="module")
def adapter(folder):
    """An adapter that has changed its base much: the model that is measured, as an unlearning might leave it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "adapter")
    return "adapter"


@pytest.fixture
def here(folder, monkeypatch):
    """In the folder of the files. The report's figures, which take long, are left out."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])


def test_evaluate_prints_what_the_evaluation_measures(here, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["evaluate", *NAMES, "--retain", "retain.jsonl", *FEW, "--report", str(out)]) == 0
    told = capsys.readouterr()
    assert "forget: forget.csv: 8 rows" in told.err and "verdict" not in told.out
    stored = json.loads((out / "metrics.json").read_text())
    (row,) = stored["rows"]
    rows = {"forget": bt.read_rows("forget.csv", role="forget", has_template=False).dataset}
    rows["retain"] = bt.read_rows("retain.jsonl", role="retain", has_template=False).dataset
    expected = bt.ForgetEvaluation(AutoTokenizer.from_pretrained("model"), max_rows=4, **rows)
    numbers = expected(AutoModelForCausalLM.from_pretrained("model"))
    assert row["name"] == "model" and row["metrics"] == pytest.approx(numbers)
    table = [line.split() for line in told.out.splitlines() if line.startswith("model")]
    shown = [numbers[name] for name in expected.primary_metrics]
    assert [float(cell) for cell in table[0][1:]] == pytest.approx(shown, abs=0.06)
    assert f"Report: {out / 'report.html'}" in told.out and (out / "report.html").is_file()
    assert stored["settings"]["model_name_or_path"] == "model" and "digest" in stored["settings"]["data"]["forget"]


def test_evaluate_judges_where_there_is_a_model_before(here, adapter, tmp_path, capsys):
    """An adapter is a model, too."""
    words = ["--model_name_or_path", adapter, "--before", "model", "--forget", "forget.csv", "--retain", "retain.jsonl"]
    assert main(["evaluate", *words, *FEW, "--report", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "before" in told and "broken: retain" in told
    assert main(["evaluate", *words, *FEW, "--report", str(tmp_path / "b"), "--redact", "true"]) == 0
    shown, redacted = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert shown["verdict"]["word"] == "broken" and shown["samples"] and not redacted["samples"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forgett", "x"], "Did you mean `forget`?"),
        (["--forget", "forget.csv"], "Give `model_name_or_path` (the model) and `forget`"),
        (["--model_name_or_path", "model"], "Give `model_name_or_path` (the model) and `forget`"),
        ([*NAMES, "--eval_rows", "0"], "`eval_rows` must be a number of at least 1, got 0"),
        ([*NAMES, "--batch_size", "0"], "`batch_size` must be"),
        ([*NAMES, "--retain", "nowhere.csv"], "There is no file or folder 'nowhere.csv'"),
        ([*NAMES, "--before", "./nowhere"], "Cannot load model './nowhere': there is no folder"),
        ([*NAMES, "--retrained", "nowhere"], "Cannot load model 'nowhere'"),
        ([*NAMES, "--tokenizer", "forget.csv"], "Cannot load tokenizer 'forget.csv': that is a file"),
        (["stray"], "'stray' belongs to no option"),
        ([*NAMES, "--retain", ""], "The name of the `retain` data is empty"),
        ([*NAMES, "--before", ""], "The name of the model is empty"),
        ([*NAMES, "--config", "nowhere.yaml"], "`--config nowhere.yaml` cannot be read"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(refused, words, message):
    assert message in refused("evaluate", *words)


def test_a_report_goes_into_no_folder_of_a_run(refused):
    assert "already holds a run (model.safetensors)" in refused("evaluate", *NAMES, "--report", "model")


def test_a_model_without_a_tokenizer(refused, folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "model" / "config.json").read_text())
    told = refused("evaluate", "--model_name_or_path", str(bare), "--forget", "forget.csv")
    assert "has no tokenizer that can be loaded: name one by `tokenizer` (`--tokenizer`)" in told


def test_help_is_one_screen(capsys):
    assert main(["evaluate", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    for each in (*fields(MeasureArguments), *fields(EvaluateArguments)):
        assert any(line.strip().startswith(f"--{each.name}") for line in lines), each.name
    assert main(["evaluate", "--help-all"]) == 0
    told = capsys.readouterr().out.replace(",", " ")  # Python 3.13 writes the value once, after all spellings
    assert all(f"--{name} " in told for name in ("forget_columns", "model_revision", "chat_template"))


def test_options_on_sets_are_the_same_everywhere():
    shared = fields(SetArguments)
    for of in (UnlearnArguments, MeasureArguments):
        own = {each.name: each for each in fields(of)}
        assert all(own[each.name].metadata == each.metadata for each in shared)
