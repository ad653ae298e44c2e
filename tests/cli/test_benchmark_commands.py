"""`blur-trainer muse`, `tofu`, `wmdp`, `compare`: help, `--config`, errors in one line, exit codes. Nothing is trained.

Whole runs: tests/examples, whose scripts have the same `main`; `compare` starts the command there.
"""

import importlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.cases import every

import blur_trainer
from blur_trainer.cli.main import COMMANDS, main
from blur_trainer.scripts import compare, muse, tofu, wmdp
from blur_trainer.scripts.running import begin_run, ended, run
from blur_trainer.trainers.ending import TrainingInterrupted

EXAMPLES = Path(blur_trainer.__file__).parents[1] / "examples"
BENCHMARKS = {"muse": muse, "tofu": tofu, "wmdp": wmdp}
SHOWN = {
    "muse": ("--corpus", "--level", "--no_baseline", "--model_name_or_path", "outputs/muse"),
    "tofu": ("--method METHOD", "sam-npo", "--split", "--level", "--config YAML", "-m blur_trainer tofu"),
    "wmdp": ("--method {blur-rmu,", "--forget_topics", "--no_robustness", "--resume_from_checkpoint true"),
    "compare": ("--benchmark {tofu,wmdp}", "--strengths", "--launcher", "`blur-trainer tofu`", "--config YAML"),
}


def test_the_commands_are_listed_in_groups(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = {line.split()[0]: place for place, line in enumerate(lines) if line}
    assert places.keys() > COMMANDS.keys()
    assert places["unlearn"] < places["Benchmarks,"] < min(places[name] for name in SHOWN)


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch):
    """What should have been refused fails here, and does not train for minutes."""
    for place in ("given", "compare"):
        monkeypatch.setattr(f"blur_trainer.scripts.{place}.begin", lambda *args: pytest.fail(f"it begins: {args}"))


@pytest.mark.parametrize("name", SHOWN)
def test_help_is_one_screen(name, capsys):
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") <= 50 and max(map(len, told.splitlines())) <= 120
    assert [word for word in SHOWN[name] if word not in told] == []
    assert "--adam_beta1" not in told


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["muse"], ["--corpus", "--gamma", "--replay", "--lora_r"]),
        (["tofu"], ["--split", "--gamma", "--adam_beta1"]),
        (["tofu", "--method=uld"], ["--num_assistant_layers", "--weight", "--lora_r"]),
        (["wmdp", "--method", "graddiff"], ["--tasks_dir", "--forget_weight"]),
    ],
    ids=" ".join,
)
def test_help_all_has_every_option_of_the_method(words, shown, capsys):
    assert main([*words, "--help-all"]) == 0
    told = capsys.readouterr().out.replace(",", " ")  # Python 3.13 writes the value once, after all spellings
    assert [flag for flag in shown if f"  {flag} " not in told] == []


def test_help_all_is_of_the_method_in_the_file(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("method: uld\n")
    assert main(["tofu", "--help-all", "--config", str(path)]) == 0
    assert "--num_assistant_layers" in capsys.readouterr().out
    assert main(["tofu", "--help-all", "--method", "nppo"]) == 2
    assert capsys.readouterr().err.startswith("blur-trainer tofu: --method 'nppo': choose among blur-target, ")


@pytest.mark.parametrize("name", [*BENCHMARKS, "compare"])
def test_the_command_is_the_script(name, monkeypatch):
    """The same function takes the words, so that no option can be of one of them only."""
    command = importlib.import_module(f"blur_trainer.cli.{name}")
    script = runpy.run_path(str(EXAMPLES / (f"{name}.py" if name == "compare" else f"run_{name}.py")))
    taken = []
    if name == "compare":
        assert script["main"] is compare.main
        monkeypatch.setattr(compare, "main", taken.append)
        assert main([name, "--seeds", "1"]) == 0
    else:
        assert command.main.main is script["main"]
        monkeypatch.setattr(command, "main", command.main._replace(main=taken.append))
        assert main([name, "--seeds", "1"]) == 0
    assert taken == [["--seeds", "1"]] and script["run"] is run


WRONG = [
    ("muse --gama 1", "--gama is no option. Did you mean --gamma?"),
    ("tofu --gama=1", "--gama is no option. Did you mean --gamma?"),
    ("tofu --method nppo", "argument --method: invalid choice: 'nppo' (choose from "),
    ("tofu --max_rows few", "argument --max_rows/--max-rows: invalid int value: 'few'."),
    ("tofu --learning_rate -1", "`learning_rate`"),
    ("wmdp stray.csv", "'stray.csv' belongs to no option."),
    ("wmdp --data_dir .", "--data_dir is for a real model"),
    ("tofu --config nowhere.yaml", "nowhere.yaml"),
    ("tofu --config", "`--config` takes one YAML file, once."),
    ("tofu --config list.yaml --config list.yaml", "`--config` takes one YAML file, once."),
    ("tofu --config=list.yaml", "`--config list.yaml` holds no options"),
    ("tofu --config broken.yaml", "`--config broken.yaml` is not YAML"),
    ("tofu --config wrong.yaml", "--gama is no option. Did you mean --gamma?"),
    ("compare --config wrong.yaml", "--gama is no option. Did you mean --gamma?"),
    ("compare --config null.yaml", "`replay` has no value in null.yaml: leave the line out."),
    ("compare --methods nppo", "invalid choice: 'nppo'"),
    ("compare --seeds one", "argument --seeds: invalid int value: 'one'."),
    ("compare --strengths 0", "--strengths [0.0]"),
]


def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"list": "- a\n", "broken": "a: [", "wrong": "gama: 1\n", "null": "replay:\n"}
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)

    def check(words, message):
        command, *rest = words.split()
        assert main([command, *rest]) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"blur-trainer {command}: ") and message in told.err and told.out == ""
        assert told.err.count("\n") == 1

    every(WRONG, check)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.yaml" for name in files}


def test_a_script_ends_as_the_command_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("run_muse", "run_tofu", "run_wmdp", "compare"):
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", "--gama", "1"])
        with pytest.raises(SystemExit) as raised:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert raised.value.code == 2
        assert capsys.readouterr().err == f"{name}.py: --gama is no option. Did you mean --gamma?\n"
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_of_an_interrupt(capsys):
    def stopped():
        raise KeyboardInterrupt

    def saved():
        raise TrainingInterrupted("Interrupted at step 3 of 8", "Go on.", 15)

    assert ended("blur-trainer tofu", lambda: None) == 0
    assert ended("blur-trainer tofu", stopped) == 130
    assert "blur-trainer tofu: interrupted. Give the same command again; if a" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        ended("blur-trainer tofu", saved)
    assert raised.value.code == 143


def test_options_may_be_in_a_file(tmp_path):
    """TRL's parser reads it: texts as words are read, words go above it."""
    stored = {"method": "pdu", "split": "forget01", "learning_rate": "1e-5", "rule_kwargs": {"epsilon": 0.5}}
    stored |= {"compare": ["npo", "idk"], "use_cpu": True, "seed": 3, "replay": None}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(stored))
    for config in (["--config", str(path)], [f"--config={path}"]):
        script, args, *_ = tofu.parse([*config, "--seed", "4"])
        assert (script.method, script.split, script.compare) == ("pdu", "forget01", ["npo", "idk"])
        assert (args.learning_rate, args.seed, args.replay) == (1e-5, 4, None)
        assert args.build_rule().epsilon == 0.5


def test_options_of_a_comparison_and_of_its_runs_may_be_in_one_file(tmp_path):
    stored = {"methods": ["pdu"], "seeds": [5], "strengths": [0.5, 1], "split": "forget01", "use_cpu": True}
    stored |= {"rule_kwargs": {"initial": 7, "epsilon": 0.5}, "output_dir": str(tmp_path / "out")}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(stored))
    found = compare.parse([f"--config={path}", "--seeds", "6"])
    assert [(run.method, run.seed) for run in found.runs] == [("pdu", 6), ("pdu", 6)]
    assert found.runs[0].flags == ('--rule_kwargs={"epsilon": 0.5, "initial": 14.0}',)
    assert found.shared[:2] == ["--rule_kwargs", '{"epsilon": 0.5, "initial": 7}'] and "--config" not in found.shared
    assert found.shared[-2:] == ["--models_dir", str(tmp_path / "out" / "models")]


def test_a_run_is_started_as_a_module():
    """An installed package has no examples."""
    lines = {
        None: [sys.executable, "-m", "blur_trainer", "wmdp"],
        "accelerate launch --num_processes 2": [
            "accelerate",
            "launch",
            "--num_processes",
            "2",
            "-m",
            "blur_trainer",
            "wmdp",
        ],
        "/bin/deepspeed --num_gpus 2": ["/bin/deepspeed", "--num_gpus", "2", "--module", "blur_trainer", "wmdp"],
    }
    for launcher, words in lines.items():
        assert compare.program(compare.CompareArguments(benchmark="wmdp", launcher=launcher)) == words


def test_deepspeeds_launcher_puts_a_word_before_the_command(capsys):
    assert main(["--local_rank=1", "tofu", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: blur-trainer tofu")


@pytest.mark.parametrize("started", ["/usr/bin/blur-trainer", "/package/blur_trainer/__main__.py"])
def test_on_several_gpus_the_command_is_launched_as_a_module(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started, "tofu"])
    with pytest.raises(ValueError, match="start `accelerate launch -m blur_trainer` with the same arguments"):
        begin_run(SimpleNamespace(n_gpu=4))
