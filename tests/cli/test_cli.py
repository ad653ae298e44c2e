"""The command line: help on one screen, errors in one line, exit codes, `--config`, what goes on after an interrupt."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from blur_trainer.cli import unlearn as command
from blur_trainer.cli.main import main
from blur_trainer.pipeline.methods import METHODS
from blur_trainer.pipeline.preparing import prepare

SHORT = {"num_train_epochs": 1, "replay": 8, "disable_tqdm": True}
FILES = {"model_name_or_path": "model", "forget": "forget.csv", "retain": "retain.jsonl"}


FOUR = [word for name, value in FILES.items() for word in (f"--{name}", value)] + ["--output_dir", "new"]


@pytest.fixture
def unlearn(folder, tmp_path, monkeypatch):
    """The command in the folder of the files, into a new folder; the report's figures are left out."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", lambda out: out / "report.html")

    def call(*words, **options):
        options = {**FILES, **SHORT, "output_dir": tmp_path / "out", **options}
        return main(["unlearn", *(f"--{name}={value}" for name, value in options.items() if value is not None), *words])

    return call


@pytest.fixture
def options(folder, monkeypatch):
    """What a command makes of its words: nothing is read or trained."""
    caught = {}

    def note(options):
        caught.update(options)
        raise ValueError("caught")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "prepare", note)

    def call(*words):
        caught.clear()
        assert main(["unlearn", *words]) == 2
        return dict(caught)

    return call


def test_commands_are_listed_and_others_refused(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "unlearn" in capsys.readouterr().out
    assert main(["forget"]) == 2
    assert "no command 'forget': choose among unlearn" in capsys.readouterr().err


def test_help_is_one_screen_and_help_all_has_everything(capsys):
    assert main(["unlearn", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for flag in ("--forget ", "--retain ", "--unseen ", "--method ", "--require ", "--config", "--output_dir"):
        assert flag in text, flag
    assert main(["unlearn", "--help-all", "--method", "uld"]) == 0
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--num_assistant_layers", "--learning_rate", "--forget_columns", "--use_peft"))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_options(method, capsys):
    assert main(["unlearn", "--help-all", f"--method={method}"]) == 0
    assert "--forget_objective" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forgett", "x"], "`forgett` is no option of unlearn with the method blur. Did you mean `forget`?"),
        (["--model", "x"], "Did you mean `model_name_or_path`?"),
        (["--learning-rat", "1"], "Did you mean `learning_rate`?"),
        (["stray.csv"], "'stray.csv' belongs to no option."),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--method", "foo"], "`method` is 'foo': choose among blur"),
        (["--require", "maybe"], "invalid choice: 'maybe'"),
        (["--config", "nowhere.yaml"], "`--config nowhere.yaml` cannot be read"),
        (["--config"], "`--config` takes one YAML file, once."),
        (["--num_assistant_layers", "2"], "It is one of uld"),
        (["--use_peft", "maybe"], "(case insensitive).\n"),
        ([*FOUR, "--thresholds", "{"], "`thresholds` must be a dict or JSON of one, got '{'"),
        ([*FOUR, "--thresholds", '{"x": 1}'], "`thresholds` has no x: there are retain, hold,"),
        ([*FOUR, "--model_init_kwargs", "{"], "`model_init_kwargs` must be a dict or JSON of one, got '{'"),
        ([*FOUR, "--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` is 'nowhere', and there is no such"),
        ([*FOUR[:-1], "model", "--resume_from_checkpoint", "false"], "'model' already holds a run"),
        ([*FOUR[:-1], "forget.csv/new"], "output_dir 'forget.csv/new' cannot be written"),
    ],
)
def test_errors_are_one_line(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(["unlearn", *words]) == 2
    told = capsys.readouterr()
    said = "".join(
        line for line in told.err.splitlines(True) if ".csv: 8 rows" not in line and "retain.jsonl: " not in line
    )
    assert message in said and said.count("\n") == 1 and told.out == ""
    assert said.startswith("blur-trainer unlearn: ")


def test_what_is_missing_is_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in FILES:
        given = {**FILES, name: None}
        assert main(["unlearn", *(f"--{key}={value}" for key, value in given.items() if value)]) == 2
        assert f"`{name}` is missing" in capsys.readouterr().err
    for name in (*FILES, "output_dir"):  # an unset variable of a shell
        assert main(["unlearn", *FOUR, f"--{name}="]) == 2
        assert f"`{name}` is missing" in capsys.readouterr().err


def test_words_go_above_the_file_and_texts_in_it_are_read_as_words(options, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("forget: a.csv\nretain: b.csv\nlearning_rate: 1e-5\ngamma: 2\nuse_peft: yes\n")
    found = options("--config", str(path), "--forget", "c.csv")
    assert found["forget"] == "c.csv" and found["retain"] == "b.csv" and found["use_peft"] is True
    assert found["learning_rate"] == 1e-5 and found["gamma"] == 2
    assert found["output_dir"] == command.OUTPUT_DIR and "seed" not in found


def test_the_method_in_the_file_decides_which_options_there_are(options, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("method: uld\nnum_assistant_layers: 2\n")
    assert options("--config", str(path), "--weight", "-1")["weight"] == -1.0
    assert options("--config", str(path), "--method", "npo", "--weight", "-1") == {}
    assert "`weight` is no option of unlearn with the method npo" in capsys.readouterr().err


def test_a_wrong_name_in_the_file_is_refused_with_the_nearest(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**FILES, "gama": 1}))
    assert main(["unlearn", "--config", str(path)]) == 2
    assert "`gama` is no option" in capsys.readouterr().err
    path.write_text("- a\n")
    assert main(["unlearn", "--config", str(path)]) == 2
    assert "holds no options" in capsys.readouterr().err


def test_derived_settings_stay_unless_what_they_follow_from_is_another(options, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**FILES, "derived": {"learning_rate": 7e-4}}))
    kept = options("--config", str(path), "--output_dir", "other", "--gamma", "3", "--forget", "forget.csv")
    assert kept["derived"] == {"learning_rate": 7e-4}
    for word in ("--method=npo", "--use_peft=true", "--forget=other.csv"):
        assert "derived" not in options("--config", str(path), word)
        assert "derived anew" in capsys.readouterr().err


def test_kept_settings_are_those_of_the_run(folder, monkeypatch, tmp_path):
    """But not those of an objective that is another one now."""
    monkeypatch.chdir(folder)
    derived = {"learning_rate": 7e-4, "forget_objective": "rmu", "forget_objective_kwargs": {"layer": 1}}
    given = {**FILES, "output_dir": str(tmp_path), "derived": derived}
    assert prepare(given).settings == derived and prepare(given).args.learning_rate == 7e-4
    other = prepare({**given, "forget_objective": "npo", "retain_objective": "nll"})
    assert other.args.forget_objective == "npo" and other.settings == {"learning_rate": 7e-4}


def test_exit_codes_follow_what_is_required(unlearn, tmp_path, capsys):
    assert unlearn("--require", "forgotten") == 1
    told = capsys.readouterr()
    table, verdict = told.out.split("\n\nReport: ")
    assert "before" in table and "BLUR-RMU" in table and "not_forgotten: " in verdict
    assert "Forgetting ends at" in told.err and "forget: forget.csv: 8 rows" in told.err
    assert unlearn() == 2  # the folder holds that run
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "already holds a run" in told.err
    assert unlearn("--resume_from_checkpoint", "true", "--require", "not_forgotten") == 0


def test_control_c_outside_of_training_says_how_to_go_on(unlearn, tmp_path, monkeypatch, capsys):
    def stop(prepared):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", stop)
    assert unlearn() == 130
    assert "give the same command again" in capsys.readouterr().err


def test_stdout_has_the_result_alone(unlearn, monkeypatch, capsys):
    def noisy(prepared):
        sys.stdout.write("Setting accelerator to CPU.\n")  # as DeepSpeed says when accelerate imports it
        raise ValueError("enough")

    monkeypatch.setattr(command, "run", noisy)
    assert unlearn() == 2
    told = capsys.readouterr()
    assert told.out == "" and "Setting accelerator" in told.err and told.err.endswith("unlearn: enough\n")


def run_as_a_process(folder, out, *words, **how):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    files = [f"--{name}={value}" for name, value in FILES.items()]
    line = [sys.executable, "-m", *how.pop("launcher", ()), "blur_trainer", "unlearn", *files, "--output_dir", str(out)]
    return subprocess.Popen(
        [*line, *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
    )


@pytest.mark.full
def test_control_c_and_resuming_give_the_uninterrupted_run(folder, tmp_path):
    """Also a test that `python -m blur_trainer` is the command."""
    words = ["--num_train_epochs", "60", "--replay", "8", "--stop_at_level", "false", "--save_strategy", "steps"]
    words += ["--save_steps", "2", "--save_total_limit", "2"]
    whole = run_as_a_process(folder, tmp_path / "whole", *words)
    out, said = whole.communicate(timeout=200)
    assert whole.returncode == 0, said
    broken = run_as_a_process(folder, tmp_path / "broken", *words)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "broken").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    broken.send_signal(signal.SIGINT)
    _, said = broken.communicate(timeout=200)
    assert broken.returncode == 130 and "--resume_from_checkpoint true" in said
    again = run_as_a_process(folder, tmp_path / "broken", *words, "--resume_from_checkpoint", "true")
    second, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    tables = [text[text.index("ROUGE") :].replace(name, "") for text, name in ((out, "whole"), (second, "broken"))]
    assert tables[0] == tables[1]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]


@pytest.mark.full
@pytest.mark.distributed
def test_two_processes_share_the_batch_and_say_the_result_once(folder, tmp_path):
    launcher = ("torch.distributed.run", "--nproc_per_node", "2", "-m")  # accelerate launches one process on CPUs
    words = ["--num_train_epochs", "1", "--replay", "8"]
    done = run_as_a_process(folder, tmp_path / "out", *words, launcher=launcher)
    out, said = done.communicate(timeout=300)
    assert done.returncode == 0, said
    assert out.count("Report: ") == 1
    derived = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["derived"]
    assert derived["processes"] == 2 and derived["per_device_train_batch_size"] == 4
