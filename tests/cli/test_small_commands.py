"""`blur-trainer merge`, `estimate`, `recipes`, `report`: each does what its help says; names are refused at once."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from _pytest.outcomes import Failed
from peft import LoraConfig, PeftModel, get_peft_model
from support import own_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.cli import recipes
from blur_trainer.cli.main import main
from blur_trainer.recipes import BENCHMARKS

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def adapter(folder, tmp_path, monkeypatch):
    """An adapter with its tokenizer, as a training leaves it, beside its base; the folder of both is the current."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", "model")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    adapted.save_pretrained("adapter")
    AutoTokenizer.from_pretrained("model").save_pretrained("adapter")
    return "adapter"


# ---- merge ----


def test_merge_writes_one_model_that_needs_no_peft(adapter, capsys):
    assert main(["merge", adapter, "whole"]) == 0
    assert capsys.readouterr().out == "The whole model is in whole.\n"
    whole = AutoModelForCausalLM.from_pretrained("whole")
    base = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        found, before = whole(IDS).logits, base(IDS).logits
        expected = PeftModel.from_pretrained(base, adapter)(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, before, atol=1e-2)
    assert not isinstance(whole, PeftModel) and AutoTokenizer.from_pretrained("whole").vocab_size > 5
    assert main(["merge", adapter, "half", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained("half", dtype="auto").dtype == torch.bfloat16


def test_merge_takes_the_base_from_elsewhere_and_overwrites_nothing(adapter, tmp_path, capsys):
    shutil.move("model", "moved")
    assert main(["merge", adapter, "whole"]) == 2
    told = capsys.readouterr().err
    assert "Cannot load model 'model'" in told and "pass `base_model` (`--base_model`)" in told
    assert main(["merge", adapter, "whole", "--base_model", "moved"]) == 0
    assert main(["merge", adapter, "whole", "--base_model", "moved"]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "'model' holds no adapter: no `adapter_config.json` is there"),
        ("nowhere", "Cannot load adapter 'nowhere': there is no folder "),
        ("./nowhere", "Cannot load adapter './nowhere': there is no folder "),
        ("out/nowhere/adapter", "names on the Hub are `name` or `user/name`"),
        ("forget.csv", "Cannot load adapter 'forget.csv': that is a file."),
    ],
)
def test_merge_refuses_what_is_no_adapter(refused, no_request, name, message):
    assert message in refused("merge", name, "whole")


# ---- names of models ----

ON_ROWS = ["--forget", "forget.csv", "--retain", "retain.jsonl"]
NAMED = {
    "unlearn": [*ON_ROWS, "--output_dir", "new"],
    "evaluate": ON_ROWS,
    "audit": [*ON_ROWS, "--output_dir", "new"],
    "estimate": [],
}


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "model.", "no where", "forget.csv"])
@pytest.mark.parametrize("command", NAMED)
def test_a_name_that_can_be_no_model_is_refused_without_asking_the_hub(refused, no_request, command, name):
    told = refused(command, "--model_name_or_path", name, *NAMED[command])
    assert f"Cannot load model {name!r}: " in told and ("Check the path." in told or "that is a file" in told)


@pytest.mark.parametrize("option", ["before", "retrained", "tokenizer"])
def test_so_are_the_other_models(refused, no_request, option):
    told = refused("evaluate", "--model_name_or_path", "model", *ON_ROWS, f"--{option}", "./nowhere")
    assert " './nowhere': there is no folder " in told


@pytest.mark.parametrize("command", [*NAMED, "merge"])
def test_a_name_that_can_be_on_the_hub_is_asked_for(folder, monkeypatch, no_request, command):
    monkeypatch.chdir(folder)
    words = ["user/name", "whole"] if command == "merge" else ["--model_name_or_path", "user/name", *NAMED[command]]
    with pytest.raises(Failed, match="the Hub was asked"):
        main([command, *words])


# ---- estimate ----


def test_estimate_says_the_memory_of_the_training(folder, monkeypatch, capsys, nothing_loaded):
    monkeypatch.chdir(folder)
    words = ["--model_name_or_path", "model", "--per_device_train_batch_size", "2", "--max_length", "32"]
    assert main(["estimate", *words, "--gpus", "4", "--sharding", "zero3"]) == 0
    args = bt.BLURConfig("x", per_device_train_batch_size=2, max_length=32)
    expected = bt.estimate_memory("model", args, 4, sharding="zero3")
    assert capsys.readouterr().out == f"{expected}\n" and expected.total > 0
    assert main(["estimate", *words, "--use_peft", "true"]) == 0
    assert "optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`model_name_or_path` is missing"),
        (["--gpu", "2"], "Did you mean `gpus`?"),
        (["--model_name_or_path", "model", "--sharding", "zero9"], "zero9"),
        (["--model_name_or_path", "model", "--gpus", "0"], "`world_size` is 0"),
        (["--model_name_or_path", "model", "--bits", "3"], "`bits` is 3"),
    ],
)
def test_estimate_refuses(refused, words, message):
    assert message in refused("estimate", *words)


# ---- recipes ----


def test_recipes_lists_names_and_shows_one(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(BENCHMARKS) and "paper" in lines[0]
    assert main(["recipes", "tofu"]) == 0
    assert capsys.readouterr().out == f"tofu: {', '.join(recipes.recipe_names('tofu'))}\n"
    assert main(["recipes", "muse-news", "paper"]) == 0
    assert json.loads(capsys.readouterr().out) == bt.recipe("muse-news", "paper")


def test_recipes_refuses_what_there_is_not(refused):
    assert "There are no recipes for 'mmlu'; there are for: muse-news" in refused("recipes", "mmlu")
    assert "tofu has no recipe 'papers'; there are: " in refused("recipes", "tofu", "papers")


def test_what_needs_no_model_imports_no_torch():
    """These are typed often, and torch and transformers take seconds."""
    code = "import sys; from blur_trainer.cli.main import main; main(['recipes']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ---- report ----


def test_report_writes_the_page_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])
    (tmp_path / "metrics.json").write_text(json.dumps(own_run.metrics()))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "BLUR-RMU" in (tmp_path / "report.html").read_text()


def test_report_refuses_a_folder_without_a_run(refused, tmp_path):
    assert "metrics.json" in refused("report", str(tmp_path))
    assert "metrics.json" in refused("report", str(tmp_path / "nowhere"))
    (tmp_path / "metrics.json").write_text("{")
    assert "metrics.json cannot be read as JSON" in refused("report", str(tmp_path))


# ---- all ----


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "audit", "merge", "estimate", "recipes", "report"])
def test_help_is_one_screen(command, capsys):
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as end:  # argparse's own way
        assert end.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert 3 < len(lines) <= 60 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: blur-trainer {command}")


@pytest.mark.parametrize("command", ["estimate", "recipes", "report", "merge", "evaluate", "audit"])
def test_control_c_is_an_exit_code(command, folder, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    calls = {"merge": "merge_and_save", "report": "write_report", "recipes": "recipe_names"}
    monkeypatch.setattr(f"blur_trainer.cli.{command}.{calls.get(command, 'options_of')}", stop)
    words = {"merge": ["a", "b"], "report": ["x"]}.get(command, [])
    assert main([command, *words]) == 130
    assert capsys.readouterr().err == f"\nblur-trainer {command}: interrupted.\n"


def test_stdout_has_the_result_alone(monkeypatch, capsys):
    """Whatever a library prints, as DeepSpeed does when it is imported."""
    real = recipes.recipe_names

    def noisy(benchmark):
        sys.stdout.write("Setting accelerator to CPU.\n")
        return real(benchmark)

    monkeypatch.setattr(recipes, "recipe_names", noisy)
    assert main(["recipes", "tofu"]) == 0
    told = capsys.readouterr()
    assert told.out == f"tofu: {', '.join(real('tofu'))}\n" and told.err == "Setting accelerator to CPU.\n"
