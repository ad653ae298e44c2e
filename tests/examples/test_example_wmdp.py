"""examples/run_wmdp.py: it forgets two topics and keeps the third; what it prints, writes, refuses and goes on with.

In this process; all runs share the tiny model that knows the topics. As processes of their own: test_launch.py.
"""

import contextlib
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support.runs import distance
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.scripts import compare, run_wmdp, wmdp

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
QUICK = ["--max_steps", 2, "--eval_strategy", "no", "--disable_tqdm", "True", "--no_robustness"]
KEYS = ["forget_potions_accuracy", "forget_machines_accuracy", "retain_dishes_accuracy"]


def load(folder, name="metrics.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("run_wmdp")
        del sys.modules["run_wmdp"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def main(example, models):
    """`main("--method", "npo")`: what the script prints with these arguments. Attacks are short."""
    attack = run_wmdp.robustness

    def run(*arguments):
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", ["run_wmdp.py", *map(str, arguments), "--models_dir", str(models)])
            patch.setattr(run_wmdp, "robustness", partial(attack, steps=[5, 10]))
            example.main()
        return printed.getvalue()

    return run


# ---- the run of the README, shorter and without what it is compared with ----


@pytest.fixture(scope="module")
def first(main, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    short = ["--num_train_epochs", 6, "--eval_strategy", "no", "--disable_tqdm", "True"]
    return folder, main("--compare", "none", *short, "--output_dir", folder)


def test_two_topics_are_forgotten_and_the_third_is_kept(first):
    target, unlearned, retrained = (row["metrics"] for row in load(first[0])["rows"])
    assert all(target[key] >= 0.95 for key in KEYS)
    assert all(retrained[key] <= 0.4 for key in KEYS[:2]) and retrained[KEYS[2]] >= 0.95
    # chance is 0.25, of 64 questions give or take 0.05
    assert all(unlearned[key] <= 0.4 for key in KEYS[:2])
    assert unlearned[KEYS[2]] >= target[KEYS[2]] - 0.05


def test_the_table_is_printed(first):
    folder, printed = first
    lines = printed.splitlines()
    assert lines[0] == "" and "training" not in printed, "more than the result"
    names = [
        line.split()[0] for line in lines if line.startswith(("target", "BLUR-RMU ", "unchanged", "4 bit", "retrain "))
    ]
    assert names == ["target", "BLUR-RMU", "retrain", "target", "unchanged", "4", "retrain"]
    assert f"Report: {folder / 'report.html'}" in printed


def test_files(first):
    folder = first[0]
    assert (folder / "model.safetensors").is_file() and "BLUR" in (folder / "README.md").read_text()
    saved = AutoModelForCausalLM.from_pretrained(folder)
    evaluation = bt.WMDPEvaluation(
        {"forget_potions": bt.load_wmdp_questions("potions")}, AutoTokenizer.from_pretrained(folder), progress=False
    )
    assert evaluation(saved)[KEYS[0]] == load(folder)["rows"][1]["metrics"][KEYS[0]]


def test_robustness_is_in_the_file_and_the_report(first):
    found = load(first[0])["robustness"]
    names = [curve["name"] for curve in found["relearning"]]
    assert names == ["forget set", "retain set", "forget set (retrain)"]
    assert [attack["name"] for attack in found["attacks"]] == ["unchanged", "8 bit", "4 bit"]
    unlearned = load(first[0])["rows"][1]["metrics"]
    for curve in found["relearning"]:
        assert curve["points"][0]["steps"] == 0
        assert (curve["points"][0]["metrics"] == unlearned) == ("retrain" not in curve["name"])
        assert [point["steps"] for point in curve["points"]] == [0, 5, 10] and set(
            curve["points"][-1]["metrics"]
        ) == set(KEYS)
    html = (first[0] / "report.html").read_text()
    assert "<h2>Robustness</h2>" in html and 'alt="Relearning' in html


@pytest.mark.full
def test_the_readme_s_lm_eval_line_gives_the_table_s_numbers(first, tmp_path):
    """`lm_eval` as a command on the saved model and the written tasks, as it stands in the README."""
    pytest.importorskip("lm_eval", reason="needs the extra wmdp")
    folder = first[0]
    (line,) = re.findall(r"^lm_eval (?:.*\\\n)*.*", README, re.MULTILINE)
    command = line.replace("\\\n", " ").replace("outputs/wmdp", str(folder)).split()
    script = Path(sys.executable).with_name("lm_eval")
    done = subprocess.run(
        [str(script), *command[1:], "--output_path", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results*.json")
    found = {f"{task}_accuracy": values["acc,none"] for task, values in load(file.parent, file.name)["results"].items()}
    row = load(folder)["rows"][1]["metrics"]
    assert found == {key: pytest.approx(row[key]) for key in KEYS}


def test_a_second_run_into_the_same_folder_is_refused(first, main):
    before = {path: path.stat().st_mtime_ns for path in first[0].rglob("*")}
    with pytest.raises(ValueError, match="already holds a run"):
        main(*QUICK, "--output_dir", first[0])
    assert {path: path.stat().st_mtime_ns for path in first[0].rglob("*")} == before


# ---- other methods, models, data ----


@pytest.fixture(scope="module")
def quick(main, first, tmp_path_factory):
    """Two steps of every method, without a report: the first run draws one."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blur_trainer.scripts.output.write_report", str)
        main(*QUICK, "--compare", *list(wmdp.METHODS)[1:], "--output_dir", folder)
    return folder


def test_every_method_took_its_steps_and_left_a_card(quick):
    rows = load(quick)["rows"]
    assert [row["name"] for row in rows] == ["target", *(method[0] for method in wmdp.METHODS.values()), "retrain"]
    assert [row["kind"] for row in rows] == ["target", "unlearned", *["baseline"] * 4, "retrain"]
    for method, (name, *_) in wmdp.METHODS.items():
        folder = quick if method == "blur-rmu" else quick / method
        assert load(folder, "trainer_state.json")["global_step"] == 2
        assert f"| {name} |" in (folder / "README.md").read_text().replace("**", "")


def test_a_model_local_corpora_and_tasks_by_the_harness(first, models, main, tmp_path):
    """The way of a published model, all of it from folders: WMDP's file names, and tasks of one's own."""
    pytest.importorskip("lm_eval", reason="needs the extra wmdp")
    data, invented = tmp_path / "data", bt.load_wmdp(corpus="embedded")
    data.mkdir()
    for name, rows in (
        ("bio_remove_dataset", invented["forget_potions"]),
        ("cyber-forget-corpus", invented["forget_machines"]),
        ("wikitext", invented["retain"]),
    ):
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in rows["text"]))
    questions = Dataset.from_list(bt.load_wmdp_questions("potions").to_list()[:6])
    write_tasks(tmp_path / "tasks", {"forget_bio": questions}, subjects={"bio": "potions"})
    layer = '{"layer":1,"coefficient":100}'
    main(
        *QUICK, "--recipe", "none", "--model_name_or_path", models / "target", "--data_dir", data,
        *("--output_dir", tmp_path / "run", "--compare", "rmu"),
        *("--tasks", "forget_bio", "--tasks_dir", tmp_path / "tasks", "--train_parameters", "mlp.down_proj"),
        *("--forget_objective_kwargs", layer, "--retain_objective_kwargs", '{"layer":1}'),
        *("--eval_strategy", "steps", "--eval_steps", 1),
        *("--topics", '{"bio":{"alpha":800,"max_length":64},"cyber":{"alpha":20}}', "--dtype", "float32"),
    )  # fmt: skip
    metrics = load(tmp_path / "run")
    assert metrics["benchmark"] == "WMDP" and [column["name"] for column in metrics["columns"]] == ["forget_bio_acc"]
    assert [row["name"] for row in metrics["rows"]] == ["target", "BLUR-RMU", "RMU"]
    history = load(tmp_path / "run", "trainer_state.json")["log_history"]
    scheduled = [entry["eval_wmdp_forget_bio_acc"] for entry in history if "eval_wmdp_forget_bio_acc" in entry]
    assert len(scheduled) == 2 and scheduled[-1] == metrics["rows"][1]["metrics"]["forget_bio_acc"]
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "target", tmp_path / "run"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]


@pytest.mark.full  # the script is TOFU's too: tests/examples/test_example_tofu.py
def test_compare_averages_over_seeds(main, quick, models, tmp_path, monkeypatch, capsys):
    """Two methods, two seeds: the runs take place in this process; the rest of compare.py is tested with TOFU."""

    def run(command, stdout, **_):
        stdout.write(main(*command[command.index("wmdp") + 1 :]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    short = ["--max_steps", "2", "--eval_strategy", "no", "--models_dir", str(models), "--output_dir", str(tmp_path)]
    short += ["--learning_rate", "0.03"]  # so far that accuracies change
    chosen = ["--benchmark", "wmdp", "--methods", "blur-rmu", "npo", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *chosen, *short])
    compare.main()
    assert "blur-rmu-1: done" in capsys.readouterr().out
    rows = load(tmp_path)["rows"]
    assert [(row["name"], row.get("runs")) for row in rows] == [
        ("target", None),
        ("BLUR-RMU", 2),
        ("NPO", 2),
        ("retrain", None),
    ]
    for row, method in ((rows[1], "blur-rmu"), (rows[2], "npo")):
        one, other = (load(tmp_path / f"{method}-{seed}")["rows"][1]["metrics"] for seed in (0, 1))
        assert any(one[key] != other[key] for key in KEYS), "both seeds gave the same model"
        for key in KEYS:
            assert row["metrics"][key] == pytest.approx((one[key] + other[key]) / 2)


# ---- interrupted ----


@pytest.mark.parametrize("where", [".", pytest.param("rmu", marks=pytest.mark.full)])
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(main, quick, where, tmp_path, monkeypatch):
    """The run of all methods is the one that nothing interrupted: of the same seed, none depends on those before it."""
    arguments = [*QUICK, "--compare", "rmu", "--output_dir", tmp_path / "run"]
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
    checkpoint = tmp_path / "run" / where / "checkpoint-1"
    assert load_file(checkpoint / "control_vectors.safetensors")["vectors"].shape == (2, 128)
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", str)
    main(*arguments, "--resume_from_checkpoint", "True")
    for name in ("model.safetensors", "rmu/model.safetensors"):
        assert distance(load_file(quick / name), load_file(tmp_path / "run" / name)) <= 1e-7, name
    assert load(tmp_path / "run")["rows"][2]["metrics"] == load(quick)["rows"][2]["metrics"]


# ---- refused ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--alpha x", ["alpha"]),
        ("--compare rmuu", ["--compare", "'rmuu'", "'rmu'"]),
        ("--data_dir .", ["--data_dir", "--model_name_or_path"]),
        ("--forget_topics bio", ["['bio']", "potions", "machines"]),
        ("--recipe papr", ["'papr'", "paper"]),
        ("--tasks wmdp_bioo --tasks_dir .", ["wmdp_bioo"]),
        ("--forget_objective_kwargs {\"layr\":2}", ["rmu", "layr"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_before_anything_is_made(main, tmp_path, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval", reason="needs the extra wmdp")
    with pytest.raises(ValueError) as raised:
        main("--output_dir", "run", *arguments.split())
    assert [word for word in words if word not in str(raised.value)] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["--recipe paper", "--model_name_or_path HuggingFaceH4/zephyr-7b-beta"])
def test_the_paper_s_recipe_is_what_the_parser_makes_of_it(given):
    script, args, model_args, tiny = wmdp.parse([*given.split(), "--forget_topics", "bio"])
    published = bt.recipe("wmdp", "paper")
    assert not tiny and script.method == "blur-rmu" and script.recipe == "paper" and not script.robustness
    assert model_args.model_name_or_path == published["model_name_or_path"] and model_args.dtype == "bfloat16"
    assert args.topics == {"bio": published["arguments"]["topics"]["bio"]}
    for name in ("learning_rate", "max_steps", "train_layers", "train_parameters", "forget_objective_kwargs"):
        assert getattr(args, name) == published["arguments"][name], name
    _, args, *_ = wmdp.parse([*given.split(), "--learning_rate", "1e-6"])
    assert args.learning_rate == 1e-6
    script, args, *_ = wmdp.parse([*given.split(), "--method", "rmu", "--recipe", "rmu"])
    assert args.rule == "sum" and script.method == "rmu"


def test_without_a_recipe_nothing_is_published():
    script, args, _, tiny = wmdp.parse(["--model_name_or_path", "x", "--recipe", "none"])
    assert not tiny and args.topics is None and args.train_layers is None
    script, *_ = wmdp.parse(["--model_name_or_path", "x", "--method", "npo"])
    assert script.recipe is None
