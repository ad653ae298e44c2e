"""examples/run_tofu.py and compare.py: what they print, write, refuse, and go on with after an interrupt.

In this process, on four questions of each set and two steps: protocols and files are those of a long run. As a process
of its own: test_example_muse.py, whose parts are the same.
"""

import contextlib
import importlib
import io
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.runs import distance
from transformers import AutoModelForCausalLM

import blur_trainer as bt
from blur_trainer.cli.main import main as command
from blur_trainer.scripts import compare, run_tofu

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["BLUR-Target", "GRU", "GradAscent", "PDU", "JensUn", "ULD"]
DATA = ["--split", "forget01", "--max_rows", 3, "--disable_tqdm", "True"]
PROTOCOL = ["--protocol", "open-unlearning"]
QUICK = [*DATA, "--max_steps", 2, "--eval_strategy", "no"]


def load(folder, name="metrics.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def training_args(folder):
    return torch.load(folder / "training_args.bin", weights_only=False)


@pytest.fixture(scope="module")
def examples():
    """Both scripts as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield {name: importlib.import_module(name) for name in ("run_tofu", "compare")}
        for name in ("run_tofu", "compare"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def main(examples, tmp_path_factory):
    """`main("--method", "npo")`: what a script prints with these arguments. All runs share the tiny models."""
    models, original, attack = tmp_path_factory.mktemp("models"), run_tofu.TOFUEvaluation, run_tofu.robustness

    def short(*args, **kwargs):
        return original(*args, **{**kwargs, "max_new_tokens": 4})

    def run(*arguments, script="run_tofu"):
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            words = [*map(str, arguments), "--models_dir", str(models)]
            patch.setattr(sys, "argv", [f"{script}.py", *words])
            patch.setattr(run_tofu, "robustness", lambda *args, **kwargs: attack(*args, **kwargs, steps=[20]))
            patch.setattr(run_tofu, "TOFUEvaluation", short)  # most of the time of a run is answers, token by token
            torch.manual_seed(0)  # as a process begins: LoRA is drawn before the trainer sets its seed
            if script == "command":
                assert command(["tofu", *words]) == 0
            else:
                examples[script].main()
        return printed.getvalue()

    return run


# ---- one run of methods of every kind; tests/scripts/test_tofu_methods.py has them all ----


@pytest.fixture(scope="module")
def first(main, examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    others = [name.lower() for name in NAMES[1:]]
    return folder, main(*QUICK, "--compare", *others, "--robustness", "--output_dir", folder)


def test_the_table_is_printed(first):
    folder, printed = first
    lines = printed.splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("target", "retrain", *NAMES))]
    assert names == ["target", *NAMES, "retrain", "target", "retrain"]
    assert lines[0] == "" and "Forgetting ends at" not in printed, "more than the result"
    assert training_args(folder).forget_level > 1
    assert training_args(folder / "gru").forget_level is None  # only of the method that has no end of its own
    assert lines[-1] == f"Report: {folder / 'report.html'}"


def test_metrics_file(first):
    metrics = load(first[0])
    assert metrics["benchmark"] == "TOFU forget01 (embedded)"
    assert metrics["plane"] == {"x": "forget_quality_log10", "y": "model_utility"}
    rows = {row["name"]: row["metrics"] for row in metrics["rows"]}
    names = {column["name"] for column in metrics["columns"]}
    assert {"forget_quality", "model_utility", "forget_rouge", "privleak"} <= names
    assert all(names <= set(row) for row in rows.values())
    assert rows["retrain"]["forget_quality"] == 1.0 and rows["retrain"]["privleak"] == pytest.approx(0.0)
    assert rows["target"]["forget_probability"] > 0.9 < rows["target"]["retain_probability"]  # it knows all by heart
    assert rows["retrain"]["forget_probability"] < 0.1 and rows["retrain"]["retain_probability"] > 0.9
    assert [row["kind"] for row in metrics["rows"]] == ["target", "unlearned", *["baseline"] * 5, "retrain"]
    trained = [rows[name]["forget_probability"] for name in NAMES]
    assert len({*trained, rows["target"]["forget_probability"]}) == 7, "two rows are of the same model"


def test_attacks_of_the_unlearned_model(first):
    found, rows = load(first[0])["robustness"], load(first[0])["rows"]
    attacks = {attack["name"]: attack["metrics"] for attack in found["attacks"]}
    assert list(attacks) == ["unchanged", "8 bit", "4 bit", "prefix"]
    assert attacks["unchanged"] == pytest.approx(rows[1]["metrics"], rel=1e-3, abs=1e-4)
    assert len({metrics["forget_probability"] for metrics in attacks.values()}) == 4
    assert "forget_quality" not in attacks["prefix"]  # the retain model was asked without
    names = [curve["name"] for curve in found["relearning"]]
    assert names == ["forget set", "holdout set", "forget set (retrain)"]
    assert found["relearning"][2]["points"][0]["metrics"]["forget_quality"] == 1.0
    assert "relearned forget set, 20 steps" in first[1]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_every_method_took_its_steps_and_left_a_card(first, examples, index):
    method = NAMES[index].lower()
    folder = first[0] / method if index else first[0]
    assert load(folder, "trainer_state.json")["global_step"] == 2
    card = (folder / "README.md").read_text()
    assert f"| {NAMES[index]} |" in card.replace("**", "") and "Model utility" in card


def test_the_model_of_uld_loads_as_any_other(first):
    model = AutoModelForCausalLM.from_pretrained(first[0] / "uld")
    assert isinstance(model, bt.LogitDifferenceModel) and model.config.weight == -1.2
    assert not (first[0] / "uld" / "model.safetensors").exists()


def test_the_report_stands_alone(first):
    html = (first[0] / "report.html").read_text()
    assert all(name in html for name in NAMES) and "data:image/png;base64" in html


def test_a_second_run_into_the_same_folder_is_refused(first, main):
    before = {path: path.stat().st_mtime_ns for path in first[0].rglob("*")}
    with pytest.raises(ValueError, match="already holds a run"):
        main(*QUICK, "--output_dir", first[0])
    assert {path: path.stat().st_mtime_ns for path in first[0].rglob("*")} == before


# ---- other data, prompts, and adapters ----


@pytest.mark.full
def test_lora_rules_and_another_protocol(main, tmp_path):
    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", 2, "--lora_alpha", 4]
    rules = ["--augment_forget", "rules", "--augment_retain", "rules"]
    more = ["--robustness", *lora, *rules, *PROTOCOL]
    main(*QUICK, "--method", "npo", "--compare", "uld", *more, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    metrics = load(tmp_path / "run")
    assert [row["name"] for row in metrics["rows"]] == ["target", "NPO", "ULD", "retrain"]
    assert metrics["settings"]["protocol"] == "open-unlearning"
    unchanged, unlearned = metrics["robustness"]["attacks"][0]["metrics"], metrics["rows"][1]["metrics"]
    assert unchanged == pytest.approx(unlearned, rel=1e-3, abs=1e-4)  # the saved adapter, loaded


# ---- interrupted ----


@pytest.mark.parametrize("where", [".", pytest.param("uld", marks=pytest.mark.full)])
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(main, first, where, tmp_path, monkeypatch):
    """The run of all methods is the one that nothing interrupted: of the same seed, none depends on those before it."""
    arguments, whole = [*QUICK, "--compare", "uld", "--output_dir", tmp_path / "run"], first[0]
    original = bt.UnlearningTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 0 and Path(self.args.output_dir) == tmp_path / "run" / where:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bt.UnlearningTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit, match="--resume_from_checkpoint true") as raised:
            main(*arguments)
    assert raised.value.code == 130
    assert (tmp_path / "run" / where / "checkpoint-1").is_dir() and not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", str)  # takes as long as the training
    main(*arguments, "--resume_from_checkpoint", "True")
    for name in ("model.safetensors", "uld/assistant/adapter_model.safetensors"):
        assert distance(load_file(whole / name), load_file(tmp_path / "run" / name)) <= 1e-7, name
    found, expected = ({row["name"]: row["metrics"] for row in load(f)["rows"]} for f in (tmp_path / "run", whole))
    assert found == {name: expected[name] for name in ("target", "BLUR-Target", "ULD", "retrain")}


# ---- refused ----


WRONG = [
    ("--gamma -1", ["`gamma`", "-1"]),
    ("--gama 1", ["--gama"]),
    ("--forget_objective_kwargs {'betta':1}", ["forget_objective_kwargs"]),
    ("--compare nppo", ["--compare", "'nppo'", "'npo'"]),
    ("--data_dir nowhere", ["data_dir", "'nowhere'", "not a folder"]),
    ("--max_rows 0", ["0", "at least 1"]),
    ("--method uld --weight nan", ["weight", "nan"]),
    ("--method uld --level unseen", ["--level", "ULD"]),
    ("--level nan", ["--level", "'nan'", "retrained, unseen, exchanged"]),
    ("--level 3 --forget_level 4", ["--level 3", "--forget_level 4.0", "one of them"]),
]


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [("run_tofu", *case) for case in WRONG] + [("compare", *case) for case in WRONG[:3]],
)
def test_wrong_arguments_are_told_before_anything_is_made(main, tmp_path, script, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = ["--methods", "blur-npo"] if script == "compare" else []
    with pytest.raises(ValueError) as raised:
        main("--output_dir", "run", *methods, *arguments.split(), script=script)
    assert [word for word in words if word not in str(raised.value)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--method", "--split", "--template", "--protocol", "--augment_forget"])
def test_wrong_choices_are_told_by_the_parser(main, tmp_path, flag):
    with pytest.raises(ValueError, match=f"{flag}.*choose from") as raised:
        main("--output_dir", tmp_path / "run", flag, "wrong")
    assert "\n" not in str(raised.value)


# ---- compare.py ----


@pytest.fixture
def launched(main, monkeypatch):
    """The command lines of the runs, which take place in this process; those of the methods in `fail` fail."""
    seen, fail = [], []

    class Done:
        def __init__(self, command, stdout, **_):
            assert command[1:4] == ["-m", "blur_trainer", "tofu"]
            arguments = command[4:]
            method, seed = (arguments[arguments.index(name) + 1] for name in ("--method", "--seed"))
            seen.append((method, seed))
            self.returncode = int((method, seed) in fail)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("blur_trainer.scripts.output.write_report", str)  # takes as long as the training
                stdout.write("no memory left\n" if self.returncode else main(*arguments, script="command"))

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=Done, STDOUT=None))
    return seen, fail


def test_compare_averages_goes_on_and_finishes_what_failed(main, launched, tmp_path):
    seen, fail = launched
    out = tmp_path / "compare"
    shared = ["--methods", "simnpo", "idk", "--seeds", 0, 1, "--output_dir", out, *QUICK]
    fail.append(("idk", "1"))
    printed = main(*shared, script="compare")
    assert seen == [("simnpo", "0"), ("idk", "0"), ("simnpo", "1"), ("idk", "1")]
    assert "idk-1: FAILED (status 1)" in printed and "\n    no memory left\n" in printed
    rows = {row["name"]: row for row in load(out)["rows"]}
    assert list(rows) == ["target", "SimNPO", "IDK", "retrain"]
    assert rows["SimNPO"]["runs"] == 2 and "runs" not in rows["IDK"]

    with pytest.raises(ValueError, match="--resume_from_checkpoint true"):
        main(*shared, script="compare")
    with pytest.raises(ValueError, match="was begun with"):
        main(*shared, "--resume_from_checkpoint", "True", "--template", "llama2", script="compare")
    fail.clear(), seen.clear()
    printed = main(*shared, "--resume_from_checkpoint", "True", script="compare")
    assert seen == [("idk", "1")], "ran again what was finished"
    rows = {row["name"]: row for row in load(out)["rows"]}
    for name in ("SimNPO", "IDK"):
        a, b = (load(out / f"{name.lower()}-{seed}")["rows"][1]["metrics"] for seed in (0, 1))
        for key in ("forget_probability", "model_utility"):
            assert a[key] != b[key], "both seeds gave the same model"
            assert rows[name]["metrics"][key] == pytest.approx((a[key] + b[key]) / 2)
            assert rows[name]["spread"][key] == pytest.approx(abs(a[key] - b[key]) / 2**0.5)
    assert "spread" not in rows["target"] and set(load(out)["samples"][0]["responses"]) == set(rows)
    assert "±" in printed and printed.splitlines()[-1] == f"Report: {out / 'report.html'}"
    assert (out / "figures" / "plane.png").is_file()


def test_compare_notes_no_token(examples, monkeypatch, tmp_path):
    for words in (["--hub_token", "hf_x"], ["--model_init_kwargs", '{"token": "hf_x"}']):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--output_dir", str(tmp_path / "out"), *words])
        with pytest.raises(ValueError, match="A token among the arguments would be written down"):
            examples["compare"].main()
    assert not (tmp_path / "out").exists()


def test_what_a_failed_process_said_last(tmp_path, capsys):
    command = [sys.executable, "-c", "import sys; print(*range(9), sep='\\n'); sys.exit(3)"]
    assert not compare.finished(tmp_path / "npo-0", command)
    assert capsys.readouterr().out.split()[-5:] == ["4", "5", "6", "7", "8"]
    assert (tmp_path / "npo-0.log").read_text().split() == list("012345678")


def test_an_interrupt_is_left_to_the_process(tmp_path):
    """Not killed, as `subprocess.run` would: it has time to save."""
    saves = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(1); print('saved')"
    with pytest.raises(SystemExit, match="Go on with --resume_from_checkpoint true"):
        compare.finished(tmp_path / "npo-0", [sys.executable, "-c", saves])
    assert (tmp_path / "npo-0.log").read_text() == "saved\n"
