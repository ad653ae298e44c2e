"""Trackers, offline: the log of the steps, the end of a run, and that no text of the sets goes along."""

import json
import sqlite3
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.image import imsave
from support.models import examples, tiny_llama
from support.own_data import write_own_data
from support.runs import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import blur_trainer as bt
from blur_trainer.pipeline import trackers
from blur_trainer.report.verdict import judge

PROMPT = "Question: Where was"
NUMBERS = {"before": {"forget_loss": 0.5, "retain_rouge": 0.9}, "after": {"forget_loss": 2.5, "retain_rouge": 0.8}}


def with_figure(folder):
    (folder / "figures").mkdir()
    imsave(folder / "figures" / "sets.png", [[[0.0, 0.5, 1.0]] * 3] * 2)
    return folder / "report.html"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return folder, write_own_data(folder, epochs=2)


@pytest.fixture
def ended(tmp_path):
    """The arguments and the verdict of a run that has ended, with one figure of its report."""
    with_figure(tmp_path)
    args = settings(tmp_path, project="own", replay=1, replay_kwargs={"prompts": [PROMPT]})
    return args, judge({"forget_loss": 0.5}, {"forget_loss": 2.5}, 2.4)


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    found.Reload()
    return found


def texts(found):
    return {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}


def holding(folder, secrets):
    """The files below the folder that hold one of the texts."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


def test_a_run_is_in_the_event_files_and_no_text_of_the_sets_is(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world[0])
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", with_figure)  # drawing takes longer than the run
    options = {"num_train_epochs": 1, "eval_rows": 4, "replay": 8, "disable_tqdm": True, "logging_steps": 1}
    options["replay_kwargs"] = {"prompts": [PROMPT], "max_new_tokens": 8}
    done = bt.unlearn("model", "forget.csv", "retain.jsonl", tmp_path / "out", report_to="tensorboard", **options)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    found = events(folder)
    assert {"train/loss/forget", "train/learning_rate"} <= set(found.Tags()["scalars"])
    for row in ("before", "after"):
        for name, value in done.metrics[row].items():
            assert found.Scalars(f"{row}/{name}")[0].value == pytest.approx(value, rel=1e-5)
    said = texts(found)
    assert said["verdict/word/text_summary"] == done.verdict.word
    assert said["verdict/sentence/text_summary"] == done.verdict.sentence
    (image,) = found.Images("figures/sets")
    assert (image.width, image.height) == (3, 2)
    assert '"prompts": "<1 PROMPTS>"' in said["args/text_summary"]
    rows = [row for rows in world[1].values() for row in rows]
    assert holding(folder, [PROMPT, *(text for row in rows for text in row.values())]) == []


def test_a_trainer_alone_logs_its_steps(tmp_path):
    args = settings(tmp_path, max_steps=2, report_to="tensorboard")
    bt.BLURTrainer(tiny_llama(), args, examples(4, seed=1), examples(4, seed=2)).train()
    (folder,) = (tmp_path / "runs").iterdir()
    assert [each.step for each in events(folder).Scalars("train/loss/retain")] == [1, 2]


def test_prompts_of_replay_are_hidden_from_whoever_stores_arguments(tmp_path):
    args = bt.BLURConfig(
        str(tmp_path), use_cpu=True, replay=2, replay_kwargs={"prompts": [PROMPT, "Who"], "top_p": 0.5}
    )
    assert args.to_dict()["replay_kwargs"] == {"prompts": "<2 PROMPTS>", "top_p": 0.5}
    assert PROMPT not in args.to_json_string() and args.build_replay().prompts == [PROMPT, "Who"]
    args = bt.BLURConfig(str(tmp_path), use_cpu=True, replay=2, replay_kwargs={"prompts": "retain"})
    assert args.to_dict()["replay_kwargs"] == {"prompts": "retain"}


def stored(path):
    with closing(sqlite3.connect(path)) as file:
        return file.execute("select metrics from metrics").fetchall()


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_gets_the_end_and_neither_terminal_nor_command_line(ended, tmp_path, monkeypatch, capsys):
    import wandb

    args, verdict = ended
    args.report_to = ["wandb"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["unlearn", "--replay_kwargs", PROMPT])
    with trackers.tracked(args):
        assert wandb.run.name == args.run_name
        sys.stdout.write(f"{PROMPT}\n")
        trackers.send_results(args, NUMBERS, verdict)
        kept = dict(wandb.run.summary)
    assert wandb.run is None, "another run in this process begins its own"
    wandb.teardown()  # its service has written everything now
    assert kept["after/forget_loss"] == 2.5 and kept["verdict/word"] == "forgotten" and kept["verdict/level"] == 2.4
    assert kept["verdict/sentence"] == verdict.sentence and kept["figures/sets"]["height"] == 2
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.rglob("media/images/figures/sets_*.png")) and holding(folder, [PROMPT]) == []
    assert holding(folder, ["after/forget_loss"]) != []


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_a_wandb_that_does_not_start_ends_a_run_before_it_trains(ended, monkeypatch):
    import wandb

    def init(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    args, _ = ended
    args.report_to = ["wandb"]
    with pytest.raises(ValueError, match="wandb, which does not start: No API key"), trackers.tracked(args):
        pytest.fail("it began")


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_takes_the_run_up_again_by_its_name(ended, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio

    args, verdict = ended
    args.report_to = ["trackio"]
    with trackers.tracked(args):
        trackio.init(args.project, args.run_name, resume="allow", embed=False)  # as Trainer's callback does
        trackio.log({"train/loss": 1.0})
        trackio.finish()
        trackers.send_results(args, NUMBERS, verdict)
    (run,) = trackio.Api().runs("own")
    assert run.name == args.run_name and run.config["learning_rate"] == args.learning_rate
    (end,) = (json.loads(row) for (row,) in stored(tmp_path / "trackio" / "own.db") if b"verdict" in row)
    assert end["after/forget_loss"] == 2.5 and end["verdict/level"] == 2.4
    assert verdict.sentence in end["verdict"]["_value"] and end["figures/sets"]["_type"] == "trackio.image"
    assert holding(tmp_path / "trackio", [PROMPT]) == []


def test_a_run_without_trackers_has_no_name(ended):
    args, verdict = ended
    with trackers.tracked(args):
        trackers.send_results(args, NUMBERS, verdict)
    assert args.run_name is None


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("wandbb", "`report_to` is 'wandbb'.*only .*wandb.* are supported"),
        ("tensorboard, clearml", "`report_to` names clearml, which cannot be used.*pip install clearml"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_training(world, monkeypatch, tmp_path, report_to, message):
    monkeypatch.chdir(world[0])
    monkeypatch.setattr("blur_trainer.pipeline.unlearn.ModelLoader", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match=message):
        bt.unlearn("model", "forget.csv", "retain.jsonl", tmp_path / "out", report_to=report_to)


def test_a_tracker_of_ours_that_is_not_installed_says_the_extra(monkeypatch):
    def missing(names):
        raise RuntimeError("TrackioCallback requires trackio to be installed. Run `pip install trackio`.")

    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", missing)
    with pytest.raises(ValueError, match=r"names trackio.*Run `pip install trackio`.*blur_trainer\[trackers\]"):
        trackers.check_trackers(SimpleNamespace(report_to=["trackio"]))


def test_several_trackers_have_commas_between_them():
    assert trackers.named_trackers("wandb, tensorboard") == ["wandb", "tensorboard"]
    assert trackers.named_trackers("all") == "all" and trackers.named_trackers(["none"]) == ["none"]
    assert json.dumps(trackers.named_trackers("none")) == '"none"'
