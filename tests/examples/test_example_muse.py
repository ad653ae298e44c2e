"""examples/run_muse.py from its command line: what it prints, writes, refuses, and goes on with after an interrupt.

One run as a user's (a process, models that know their texts by heart); the others in this process, on models of 16
dimensions that know nothing: protocols and files are the same. On two processes: test_launch.py.
"""

import importlib.util
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.example_runs import FILES, PRECOMPUTED, as_the_hub, launch, load, with_ignorant_models
from support.runs import distance, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.data.muse import limit_documents
from blur_trainer.models.reference import REFERENCE_ADAPTER
from blur_trainer.scripts import run_muse

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_muse.py"
QUICK = ["--num_train_epochs", "1", "--eval_strategy", "no", "--no_baseline", "--disable_tqdm", "True"]
PAPER = ["--recipe", "paper"]  # where the method does not matter: without replay, which is sampled first
BRIEFLY = ["--replay", 8, "--replay_kwargs", '{"max_new_tokens":8,"loss_quantile":null}']
LEVEL = "Forgetting ends at "
LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", 2]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def main(monkeypatch):
    """`main("--gamma", "0.2")`: the example's main function with these arguments."""
    spec = importlib.util.spec_from_file_location("run_muse", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_muse", module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_muse.py", *map(str, arguments)])
        torch.manual_seed(0)  # as a process begins: LoRA is drawn before the trainer sets its seed
        module.main()

    return run


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return as_the_hub(tmp_path_factory.mktemp("news"))


@pytest.fixture
def attacked_briefly(monkeypatch):
    original = run_muse.robustness
    monkeypatch.setattr(run_muse, "robustness", lambda *args, **kwargs: original(*args, **kwargs, steps=[2]))


@pytest.fixture
def unreported(monkeypatch):
    """No report is drawn, where a test does not look at it."""
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", str)


@pytest.fixture
def out(tmp_path, local):
    return with_ignorant_models(tmp_path / "run", bt.load_muse("news", local))


# ---- as a user runs it ----


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    short = ["--max_documents", 3, "--replay", 64, "--eval_steps", 15]
    done = launch(EXAMPLE, *short, "--output_dir", "run", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done


def test_the_table_is_printed(first):
    lines = first[1].stdout.splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("target", "BLUR-", "retrain"))]
    assert names == ["target", "BLUR-Target", "BLUR-NPO", "retrain"]
    assert sum("PrivLeak →0" in line for line in lines) == 1
    assert lines[-1] == f"Report: {Path('run') / 'report.html'}"
    assert not first[1].stdout.strip().startswith("["), "DeepSpeed's words are no part of the result"
    (level,) = [line for line in first[1].stderr.splitlines() if line.startswith(LEVEL)]
    assert level.endswith("what the retrained model loses on each row to forget.")


def test_it_unlearns(first):
    """What a smoke test would miss: the target knows all, BLUR forgets the forget set and keeps the retain set.

    To the level: as the retrained model, which still says some of it. As published: hold suffers.
    """
    metrics = load(first[0])
    target, blur, baseline, retrain = (row["metrics"] for row in metrics["rows"])
    for key in ("forget_verbmem", "forget_knowmem", "retain_verbmem", "retain_knowmem", "hold_verbmem"):
        assert target[key] > 90, key
    assert blur["forget_verbmem"] == pytest.approx(retrain["forget_verbmem"], abs=15)
    assert blur["forget_knowmem"] < 50  # of three questions
    for kept in (blur, baseline):
        assert kept["retain_verbmem"] > 70 and kept["retain_knowmem"] > 70
    assert blur["hold_verbmem"] > baseline["hold_verbmem"] + 30
    assert retrain["forget_knowmem"] < 50 and retrain["privleak"] == pytest.approx(0.0)
    assert target["privleak"] < -50


def test_files(first):
    folder, _ = first
    assert {path.name for path in folder.iterdir() if path.is_file()} == (FILES - PRECOMPUTED) | {"replay.json"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"baseline", "figures", "retrain", "target"}
    assert {path.stem for path in (folder / "figures").iterdir()} == {"before_after", "plane", "losses", "gradients"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "figures").iterdir())
    assert {"model.safetensors", *PRECOMPUTED} <= {path.name for path in (folder / "baseline").iterdir()}
    assert not (folder / "baseline" / "replay.json").exists()
    assert not [name for name in contents(folder) if ".part" in name or ".saving" in name]


def test_metrics_file(first):
    metrics = load(first[0])
    assert metrics["benchmark"] == "MUSE (embedded)"
    assert [row["kind"] for row in metrics["rows"]] == ["target", "unlearned", "baseline", "retrain"]
    names = {column["name"] for column in metrics["columns"]}
    assert {"forget_verbmem", "retain_knowmem", "hold_knowmem", "privleak"} <= names
    assert all(names <= set(row["metrics"]) for row in metrics["rows"])
    assert [row["seconds"] is not None for row in metrics["rows"]] == [False, True, True, False]
    assert metrics["settings"]["gamma"] == 0.15 and metrics["settings"]["max_documents"] == 3
    assert metrics["settings"]["environment"]["blur_trainer"] == bt.__version__
    assert "stages" not in metrics
    for sample in metrics["samples"]:
        assert set(sample["responses"]) == {"target", "BLUR-Target", "BLUR-NPO", "retrain"}


def test_curves_of_the_benchmark_are_in_the_log(first):
    history = load(first[0], "trainer_state.json")["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_muse_forget_verbmem" in entry]
    assert evaluated[:2] == [15, 30]
    assert any("grad/cosine" in entry and "loss/forget" in entry for entry in history)


def test_the_models_load_and_are_those_of_the_table(first):
    folder, _ = first
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in (".", "baseline", "target")}
    pairs = [(".", "target"), ("baseline", "target"), (".", "baseline")]
    assert all(distance(weights(models[a]), weights(models[b])) > 1e-3 for a, b in pairs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = limit_documents(bt.load_muse("embedded"), 3, seed=42)
    evaluation = bt.MUSEEvaluation(
        {key: data[key] for key in ("knowmem_forget_qa", "knowmem_retain_qa")}, tokenizer, icl=False, progress=False
    )
    rows = {row["name"]: row["metrics"] for row in load(folder)["rows"]}
    for path, name in ((".", "BLUR-Target"), ("baseline", "BLUR-NPO")):
        for key, value in evaluation(models[path]).items():
            assert value == pytest.approx(rows[name][key], abs=0.01), (name, key)


def test_the_card_and_the_report_show_the_numbers(first):
    folder, _ = first
    card, html = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    for word in ("BLUR-Target", "BLUR-NPO", "retrain", "VerbMem forget", "KnowMem retain", "TargetLoss(", "64"):
        assert word in card, word
    assert "MUSE (embedded)" in html and "data:image/png;base64" in html
    assert str(folder.parent) not in card + html


def test_a_second_run_into_the_same_folder_is_refused_before_any_training(first, main, monkeypatch):
    folder, _ = first
    before = contents(folder)
    monkeypatch.setattr(run_muse, "load_muse", lambda *args: pytest.fail("went on to the data"))
    with pytest.raises(ValueError, match="already holds a run") as raised:
        main("--max_documents", 3, "--output_dir", folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    assert contents(folder) == before


# ---- protocols ----


class Training(NamedTuple):
    given: Any  # the model, and its weights when it was given
    weights: dict
    texts: list[str]
    levels: list[float] | None  # row by row
    folder: Path
    trainer: Any


@pytest.fixture
def trainings(monkeypatch):
    """What each trainer was given."""
    seen = []

    class Spy(bt.BLURTrainer):
        def __init__(self, model, args, *, forget_dataset, **kwargs):
            given = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
            rows = list(forget_dataset)
            texts, levels = ([row[key] for row in rows if key in row] or None for key in ("text", "forget_level"))
            seen.append(Training(model, weights(given), texts, levels, Path(args.output_dir), self))
            super().__init__(model, args, forget_dataset=forget_dataset, **kwargs)

    monkeypatch.setattr(run_muse, "BLURTrainer", Spy)
    return seen


def of_target(out):
    return weights(AutoModelForCausalLM.from_pretrained(out / "target"))


@pytest.mark.full
def test_sequence_goes_on_with_what_the_last_stage_left(main, tmp_path, trainings):
    data = bt.load_muse("embedded")
    out = with_ignorant_models(tmp_path / "run", data)
    main("--sequence", *QUICK, *PAPER, "--output_dir", out)
    assert [stage.texts for stage in trainings] == [list(data[f"sust_forget_{k}"]["text"]) for k in range(1, 5)]
    assert distance(trainings[0].weights, of_target(out)) == 0
    for earlier, later in pairwise(trainings):
        assert later.given == str(earlier.folder) and distance(earlier.weights, later.weights) > 1e-4
    metrics = load(out)
    assert [stage["name"] for stage in metrics["stages"]] == ["sust 1", "sust 2", "sust 3", "sust 4"]
    keys = {column["name"] for column in metrics["columns"]}
    assert all(set(stage["metrics"]) == keys for stage in metrics["stages"])
    (unlearned,) = [row for row in metrics["rows"] if row["kind"] == "unlearned"]
    assert {key: unlearned["metrics"][key] for key in keys} == metrics["stages"][-1]["metrics"]
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert distance(weights(saved), weights(trainings[-1].trainer.model)) == 0
    assert (out / "figures" / "stages.png").is_file()
    assert metrics["settings"]["sequence"] is True


def test_scale_begins_with_the_target_each_time(main, out, local, trainings, capfd, unreported):
    before = {name: contents(out / name) for name in ("target", "retrain")}
    main("--data_dir", local, "--scale", *QUICK, *BRIEFLY, "--output_dir", out)
    assert [distance(stage.weights, of_target(out)) for stage in trainings] == [0.0] * 4
    assert all(distance(stage.weights, weights(stage.trainer.model)) > 1e-4 for stage in trainings)
    assert [len(stage.texts) for stage in trainings] == [1, 2, 3, 4]
    check_levels(out, trainings)
    assert [stage.folder for stage in trainings] == [out / "scal_1", out / "scal_2", out / "scal_3", out]
    assert [stage["name"] for stage in load(out)["stages"]] == ["scal 1", "scal 2", "scal 3", "scal 4"]
    printed = capfd.readouterr()
    assert "Making the" not in printed.err, "made models although there were some"
    assert {name: contents(out / name) for name in ("target", "retrain")} == before
    assert "BLUR-Target" in printed.out and "BLUR-NPO" not in printed.out
    assert printed.err.count(LEVEL) == 4 and LEVEL not in printed.out


def check_levels(out, trainings):
    """Row by row what the retrained model loses on the text; each training has its own texts, and its own levels."""
    tokenizer, retrained = (cls.from_pretrained(out / "retrain") for cls in (AutoTokenizer, AutoModelForCausalLM))
    losses = {}
    for text in {text for training in trainings for text in training.texts}:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        losses[text] = float(retrained(input_ids=ids, labels=ids).loss)
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses) > 1
    for training in trainings:
        assert training.levels == pytest.approx([losses[text] for text in training.texts], rel=1e-4)
        assert training.trainer.args.forget_level == "column"


@pytest.mark.full
def test_the_baseline_begins_with_the_target_too(main, out, local, trainings, attacked_briefly, capfd):
    quick = [word for word in QUICK if word != "--no_baseline"]
    main("--data_dir", local, *quick, *BRIEFLY, "--robustness", "--output_dir", out)
    assert [run.folder for run in trainings] == [out, out / "baseline"]
    assert [run.trainer.rule for run in trainings] == [bt.BLUR(gamma=0.15), bt.BLUR(gamma=0.1)]
    assert [run.levels is None for run in trainings] == [False, True]  # as published: without an end
    assert [distance(run.weights, of_target(out)) for run in trainings] == [0.0, 0.0]
    metrics = load(out)
    assert metrics["benchmark"] == "MUSE (news)" and [row["name"] for row in metrics["rows"]][2] == "BLUR-NPO"
    assert not any(column["name"].startswith("hold") for column in metrics["columns"])
    check_attacks(out, ["forget set", "retain set", "forget set (retrain)"])
    printed = capfd.readouterr()
    assert "Attack: relearning retain set" in printed.err
    assert [line.partition(" ")[0] for line in printed.out.splitlines()].count("retrain") == 2  # in both tables


def check_attacks(folder, curves):
    """Of the model of the table: what is not attacked has its numbers."""
    metrics = load(folder)
    unlearned, attacks = metrics["rows"][1]["metrics"], metrics["robustness"]["attacks"]
    assert [attack["name"] for attack in attacks] == ["unchanged", "8 bit", "4 bit", "prefix"]
    assert attacks[0]["metrics"] == pytest.approx(unlearned, abs=0.5)
    aucs = [attack["metrics"]["privleak_auc"] for attack in attacks]
    assert aucs[0] == aucs[3], "the prefix is not of the texts that are scored"
    assert [curve["name"] for curve in metrics["robustness"]["relearning"]] == curves
    assert [point["steps"] for point in metrics["robustness"]["relearning"][0]["points"]] == [0, 2]
    assert (folder / "figures" / "relearning.png").is_file()


# ---- a model of the user's ----


def test_a_model_by_name_with_lora(main, out, local, tmp_path, capfd, attacked_briefly):
    model = str(out / "target")
    other = ["--learning_rate", "1e-3", "--max_length", 512, "--report_to", "none", "--use_cpu", "True"]
    arguments = ["--data_dir", local, "--model_name_or_path", model, *LORA, *other, *QUICK, "--robustness"]
    main(*[word for word in arguments if word != "--no_baseline"], "--output_dir", tmp_path / "lora")
    metrics = load(tmp_path / "lora")
    assert [row["name"] for row in metrics["rows"]] == ["target", "BLUR-NPO"]
    assert "privleak" in {column["name"] for column in metrics["columns"]}  # the zero of News is published
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "lora" / "model.safetensors").exists() and not (tmp_path / "lora" / "target").exists()
    assert "BLUR-NPO" in capfd.readouterr().out
    check_attacks(tmp_path / "lora", ["forget set", "retain set"])


def test_a_model_by_name_on_the_embedded_corpora_has_no_known_zero(main, tmp_path, trainings, capfd):
    """No AUC of a retrained model is published for them: PrivLeak is left out, its AUC is there. A level, if asked."""
    data = limit_documents(bt.load_muse("embedded"), 2, seed=42)
    with_ignorant_models(tmp_path, data)
    other = ["--max_steps", 1, "--report_to", "none", "--use_cpu", "True", "--max_documents", 2]
    other += ["--level", "unseen"]
    main("--model_name_or_path", tmp_path / "target", *other, *QUICK, "--output_dir", tmp_path / "run")
    for row in load(tmp_path / "run")["rows"]:
        assert "privleak" not in row["metrics"] and 0 <= row["metrics"]["privleak_auc"] <= 1
    (level,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith(LEVEL)]
    assert level.endswith("what the target loses on rows that nobody saw.")
    assert trainings[0].trainer.args.forget_level == pytest.approx(float(level.split()[3]), abs=0.01)


# ---- interrupted ----


INTERRUPTED = {
    "in BLUR, before the baseline began": (BRIEFLY, "."),
    "in the baseline, after BLUR had finished": (BRIEFLY, "baseline"),
    "in the third stage of four, LoRA": (["--sequence", "--no_baseline", *BRIEFLY, *LORA], "sust_3"),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, local):
    """The folders of runs that nothing interrupts, by their arguments."""
    known = {}

    def whole(main, *arguments):
        if arguments not in known:
            known[arguments] = with_ignorant_models(tmp_path_factory.mktemp("whole"), bt.load_muse("news", local))
            main(*arguments, "--output_dir", known[arguments])
        return known[arguments]

    return whole


# the protocol goes through all of it: stages, LoRA, a model of the last stage; what is left is of one baseline
@pytest.mark.parametrize(
    "case", [case if "LoRA" in case else pytest.param(case, marks=pytest.mark.full) for case in INTERRUPTED]
)
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(case, main, out, local, wholes, monkeypatch, unreported):
    """SIGTERM in the second step of one of several trainings: those before it are not repeated, those after it run."""
    more, where = INTERRUPTED[case]
    arguments = ["--data_dir", local, "--num_train_epochs", 3, "--eval_strategy", "no", "--disable_tqdm", "True", *more]
    whole = wholes(main, *arguments)
    original, begun = bt.BLURTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1 and Path(self.args.output_dir) == out / where:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    def watched(self, *args, **kwargs):
        begun.append((Path(self.args.output_dir), self.state.global_step))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bt.BLURTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit, match="--resume_from_checkpoint true") as raised:
            main(*arguments, "--output_dir", out)
    assert raised.value.code == 143
    assert (out / where / "checkpoint-2").is_dir() and not (out / "metrics.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(bt.BLURTrainer, "training_step", watched)
        main(*arguments, "--output_dir", out, "--resume_from_checkpoint", "True")
    assert begun[0] == (out / where, 2), "not where it was interrupted"
    name = "adapter_model.safetensors" if LORA[0] in more else "model.safetensors"
    others = ("target", "retrain", REFERENCE_ADAPTER)
    saved = sorted(path.relative_to(whole) for path in whole.rglob(name) if path.parent.name not in others)
    assert len(saved) == (4 if LORA[0] in more else 2)
    for path in saved:
        assert distance(load_file(whole / path), load_file(out / path)) <= 1e-7, path
    for path in (path.relative_to(whole) for path in whole.rglob("replay.json")):
        assert (whole / path).read_bytes() == (out / path).read_bytes(), path
    expected, found = load(whole), load(out)
    assert [row["metrics"] for row in found["rows"]] == [row["metrics"] for row in expected["rows"]]
    assert found.get("stages") == expected.get("stages")


# ---- refused ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sequence", "--scale"], ["--sequence", "--scale", "one of them"]),
        (["--data_dir", "nowhere"], ["data_dir", "'nowhere'", "not a folder"]),
        (["--max_documents", "0"], ["0", "at least 1"]),
        (["--max_documents", "2", "--sequence"], ["sust_forget_1", "limited"]),
        (["--resume_from_checkpoint", "True"], ["no checkpoint", "--resume_from_checkpoint"]),
        (["--forget_objective_kwargs", '{"betta": 1}'], ["'betta'", "'level'"]),
        (["--gamma", "-1"], ["`gamma`", "-1"]),
        (["--robustness", "--dtype", "float16"], ["--robustness", "--dtype bfloat16"]),
        (["--level", "retraind"], ["--level", "'retraind'", "retrained, unseen, exchanged", "nats"]),
        (["--level", "-1"], ["--level", "'-1'", "nats"]),
        (["--level", "retrained", "--model_name_or_path", "x"], ["--level retrained", "--level unseen"]),
        (["--level", "3", "--forget_level", "4"], ["--level", "--forget_level", "one of them"]),
    ],
    ids=lambda value: " ".join(value) if "--" in value[0] else "",
)
def test_wrong_arguments_are_one_line_before_anything_is_made(main, tmp_path, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as raised:
        main("--output_dir", "run", *arguments)
    message = str(raised.value)
    assert "\n" not in message and [word for word in words if word not in message] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--corpus", "nws"], ["--corpus", "'nws'", "embedded", "news", "books"]),
        (["--rule", "blurr"], ["--rule", "'blurr'", "pcgrad"]),
    ],
)
def test_wrong_choices_are_told_by_the_parser(main, tmp_path, arguments, words):
    with pytest.raises(ValueError) as raised:
        main("--output_dir", tmp_path / "run", *arguments)
    assert "\n" not in str(raised.value) and [word for word in words if word not in str(raised.value)] == []
    assert list(tmp_path.iterdir()) == []


def test_unknown_arguments_are_not_ignored(main, tmp_path):
    with pytest.raises(ValueError, match="--gama"):
        main("--output_dir", tmp_path / "run", "--gama", "0.2")
    assert list(tmp_path.iterdir()) == []


def test_help(main, capsys):
    with pytest.raises(SystemExit) as raised:
        main("--help")
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--corpus", "--data_dir", "--sequence", "--scale", "--gamma", "--forget_objective", "MUSE corpus."):
        assert word in text
