"""What the examples share: one look at the command line, the methods compared, what is attacked, what is left."""

import ast
import json
import logging
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.cases import every
from support.models import tiny_llama as small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.cli.main import COMMANDS
from blur_trainer.scripts import muse, running, tofu, wmdp
from blur_trainer.scripts.attacks import relearning_sets
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import begin, is_finished, train_and_save
from blur_trainer.toy.model import tiny_llama, train_tokenizer
from blur_trainer.trainers.ending import TrainingInterrupted

BENCHMARKS = {"muse": muse, "tofu": tofu, "wmdp": wmdp}
EXAMPLES = sorted(
    path for path in (Path(bt.__file__).parents[1] / "examples").glob("*.py") if path.stem != "serve_uld"
)  # which asks a server, and has no command


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_shows_the_arguments_of_script_trainer_and_model(name, capsys):
    with pytest.raises(SystemExit) as raised:
        BENCHMARKS[name].parse(["--help"])
    told = capsys.readouterr().out
    assert raised.value.code == 0
    for flag in ("--robustness", "--learning_rate", "--gamma", "--model_name_or_path"):
        assert flag in told, flag


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_model_in_a_config_file_is_a_model(name, tmp_path):
    """The defaults of tiny models are not for it."""
    (tmp_path / "own.yaml").write_text(
        f"model_name_or_path: own/model\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n"
    )
    _, args, model_args, tiny = BENCHMARKS[name].parse(["--config", str(tmp_path / "own.yaml"), "--bf16", "False"])
    assert not tiny and model_args.model_name_or_path == "own/model"
    assert args.learning_rate != 1e-3 and args.report_to != ["none"]


def test_what_is_compared_shares_machine_seed_and_length_and_stays_itself(tmp_path):
    given = ["--method", "npo", "--compare", "simnpo", "uld", "npo", "--seed", "7", "--max_length", "99"]
    script, args, _, tiny = tofu.parse([*given, "--output_dir", str(tmp_path), "--learning_rate", "0.5"])
    configs = tofu.configurations(script, args, tiny)
    assert list(configs) == ["npo", "simnpo", "uld"] and configs["npo"] is args
    assert [(config.seed, config.max_length) for config in configs.values()] == [(7, 99)] * 3
    assert [config.learning_rate for config in configs.values()] == [0.5, 1e-3, 5e-3]
    assert configs["simnpo"].forget_objective == "simnpo" and configs["uld"].eval_strategy == "no"


def test_relearning_takes_a_tenth_and_at_least_four_of_each_set():
    tokenizer = train_tokenizer(["some words"])
    rows = [{"text": f"some words {i}"} for i in range(60)]
    args = bt.BLURConfig("unused", max_length=32, seed=1, use_cpu=True)
    many = relearning_sets({"forget set": rows, "other": rows}, tokenizer, args)
    assert {name: len(found) for name, found in many.items()} == {"forget set": 6, "other": 6}
    few = relearning_sets({"forget set": rows[:9], "other": rows}, tokenizer, args)
    assert {name: len(found) for name, found in few.items()} == {"forget set": 4, "other": 4}
    assert relearning_sets({"a": rows}, tokenizer, args)["a"][:] == many["forget set"][:]


def test_models_are_loaded_as_the_command_line_says(tmp_path):
    tiny_llama(train_tokenizer(["a"]), hidden_size=16).save_pretrained(tmp_path / "model")
    _, args, model_args, _ = muse.parse(["--output_dir", str(tmp_path / "out"), "--dtype", "bfloat16"])
    load = ModelLoader(args, model_args)
    assert [load(tmp_path / "model", **more).dtype for more in ({}, {"to_train": True})] == [torch.bfloat16] * 2
    assert isinstance(load.options, dict) and AutoModelForCausalLM.from_pretrained(tmp_path / "model", **load.options)


def test_a_revision_is_that_of_the_named_model(monkeypatch, tmp_path):
    words = ["--model_name_or_path", "a/b", "--model_revision", "dev", "--output_dir", str(tmp_path)]
    _, args, model_args, _ = muse.parse(words)
    load, asked = ModelLoader(args, model_args), []
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", lambda name, **kwargs: asked.append((name, kwargs)))
    for name in ("a/b", "a/retrained"):
        load(name), load.tokenizer(name)
    assert [(name, kwargs.get("revision")) for name, kwargs in asked] == [("a/b", "dev")] * 2 + [
        ("a/retrained", None)
    ] * 2
    assert load.options["revision"] == "dev"
    assert all(kwargs["trust_remote_code"] is False for _, kwargs in asked)


def test_code_that_comes_with_a_model_is_refused_and_not_asked_for(tmp_path, monkeypatch):
    """Left open, the auto classes of transformers ask on stdin whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on stdin"))
    evil, adapter = tmp_path / "evil", tmp_path / "adapter"
    small_llama().save_pretrained(evil)
    stored = json.loads((evil / "config.json").read_text())
    stored |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (evil / "config.json").write_text(json.dumps(stored))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    get_peft_model(small_llama(), LoraConfig()).save_pretrained(adapter)
    _, args, model_args, _ = muse.parse(["--output_dir", str(tmp_path)])

    def refused(load):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()

    every(
        {
            "scripts": (lambda: ModelLoader(args, model_args)(str(evil)),),
            "memory": (lambda: bt.estimate_memory(str(evil), bt.BLURConfig(str(tmp_path), use_cpu=True)),),
            "task vector": (lambda: bt.task_vector(evil, adapter, tmp_path / "out"),),
        },
        refused,
    )
    assert not (tmp_path / "ran").exists()


def test_a_run_that_ended_is_known_only_where_one_resumes(tmp_path):
    def arguments(*more):
        return muse.parse(["--output_dir", str(tmp_path), *more])

    (tmp_path / "trainer_state.json").write_text("{}")
    script, args, model_args, _ = arguments()
    assert not is_finished(args, tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        begin(script, args, model_args)
    script, args, model_args, _ = arguments("--resume_from_checkpoint", "True")
    assert begin(script, args, model_args) == tmp_path and is_finished(args, tmp_path)
    assert logging.getLogger("blur_trainer.trainers.datasets").isEnabledFor(logging.INFO)  # the first examples


def test_an_interrupted_training_ends_the_script_with_the_signal_s_code(tmp_path, capsys):
    class Interrupted:
        """A trainer whose training a signal ends: nothing of it is to be saved or evaluated."""

        args = muse.parse(["--output_dir", str(tmp_path)])[1]

        def remove_callback(self, callback):
            pass

        add_callback = remove_callback

        def train(self, resume_from_checkpoint):
            raise TrainingInterrupted("Interrupted at step 3 of 8", "In Python so.", signal.SIGTERM)

    with pytest.raises(TrainingInterrupted) as raised:
        train_and_save(Interrupted(), "NPO")
    assert raised.value.code == 143
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == str(raised.value)
    assert told == "Interrupted at step 3 of 8. Go on with --resume_from_checkpoint true and the same arguments."


def test_a_failed_training_says_where(tmp_path, caplog):
    """The command says one line only, after hours."""

    class Failing:
        args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, disable_tqdm=True)

        def remove_callback(self, callback):
            pass

        add_callback = remove_callback

        def train(self, resume_from_checkpoint):
            raise TypeError("deep inside")

    with pytest.raises(TypeError, match="deep inside"):
        train_and_save(Failing(), "NPO")
    assert "NPO: the training failed." in caplog.text and "in train\n" in caplog.text


def test_a_run_goes_on_after_the_training_too(tmp_path):
    """Interrupted in the evaluation, with no checkpoint asked for."""
    args = muse.parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "True"])[1]
    with pytest.raises(ValueError, match="holds no checkpoint: leave --resume_from_checkpoint out"):
        muse.check_resuming(args, tmp_path)
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "trainer_state.json").touch()
    muse.check_resuming(args, tmp_path)


def test_output_has_a_second_table_where_there_were_attacks(tmp_path):
    results = bt.Results("toy", lambda model: {"forget_x": 0.25, "retain_y": 0.5})
    results.add("target", "target", None)
    script, args, _, _ = muse.parse(["--output_dir", str(tmp_path)])
    said = settings_of(script, args, ("gamma", "seed"))
    assert list(said)[:3] == ["gamma", "seed", "corpus"]
    text = write_output(tmp_path, results, {}, said, columns=["forget_x"])
    assert text.startswith("\n") and text.endswith(f"\n\nReport: {tmp_path / 'report.html'}")
    assert (
        "forget_x" in text and "retain_y" not in text and [line[:6] for line in text.split("\n")].count("------") == 1
    )
    attack = {"name": "8 bit", "metrics": {"forget_x": 0.75, "retain_y": 0.5}}
    results.add_robustness({"attacks": [attack], "relearning": []})
    text = write_output(tmp_path, results, {}, said, columns=["forget_x"])
    assert "8 bit" in text and "0.750" in text and "retain_y" in text


def test_runs_have_the_same_steps():
    """Readable from top to bottom."""
    words = ("Arguments", "Data", "Models", "Evaluation", "Unlearn", "Forgotten", "Output")
    expected = [f"{number}. {word}" for number, word in enumerate(words, 1)]
    for name in BENCHMARKS:
        text = Path(running.__file__).with_name(f"run_{name}.py").read_text(encoding="utf-8")
        assert re.findall(r"^    # (\d\. \w+)", text, re.MULTILINE) == expected, name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_thin_and_say_where_to_read_on(path):
    text = path.read_text(encoding="utf-8")
    told = ast.get_docstring(ast.parse(text))
    command = path.stem.removeprefix("run_")
    assert f"`blur-trainer {command}` is the same" in told and f"examples/{path.name} " in told
    assert command in COMMANDS
    (body,) = re.findall(r"blur_trainer/scripts/(\w+)\.py\.", told)
    code = f"from blur_trainer.scripts.{body} import main from blur_trainer.scripts.running import run "
    assert " ".join(text.rpartition('"""')[2].split()) == f'{code}if __name__ == "__main__": run(main)'
