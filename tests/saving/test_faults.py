"""Real processes killed while they train and save: the directory they leave continues to the uninterrupted result.

Every run: a kill before each fifth change in the folder, and some at random moments, of one process.
`pytest -m full`: many more of these, of one of two on every engine, and the slower ways to stop a launcher. What a run
asks of the worker is what its tests look at.
"""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from support.cases import chosen
from support.fault_worker import REPLACED, RETAIN, make
from support.processes import ENVIRONMENT, SUPPORT
from support.runs import distance, weights
from transformers import TrainerCallback

from blur_trainer.saving.checkpoints import last_complete_checkpoint
from blur_trainer.trainers.callbacks import ReportCallback

WORKER = SUPPORT / "fault_worker.py"
STEPS = 12
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def memory():
    """A folder in memory where there is one: what a kill leaves behind is the same, and fsync costs nothing."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def worker(folder, *requests):
    command = [sys.executable, str(WORKER), str(folder), *requests]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def full(request_):
    return pytest.param(request_, marks=pytest.mark.full)


KILLS = ("kills:4:0",)
ENGINES = ("fsdp2", "fsdp2_lean", "zero2", "zero3")
MORE_KILLS = (
    "kills:12:2",
    "kills:3:1:2",
    "kills:5:3:2",
    "kills:2:0:2:fsdp2",
    "kills:2:1:2:zero3",
    *(f"kills:3:{seed}:2:{engine}" for seed, engine in enumerate(ENGINES, 4)),
)
ONCE = ("whole by sharded", "adapter by adapter")
STOPPED = ("SIGTERM", "SIGKILL")  # to torchrun, to one of its processes


def stop(folder, how):
    """A training under torchrun, stopped after its first checkpoint: the exit code and the log."""
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryFile() as log:
        command = [*launcher, str(WORKER), str(folder), "train"]
        launched = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not list((folder / "run").glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
                time.sleep(0.02)
            if how == "SIGTERM":
                launched.send_signal(signal.SIGTERM)
            else:
                os.kill(int((folder / "process-1").read_text()), signal.SIGKILL)
            code = launched.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                launched.kill()
            launched.wait()
        log.seek(0)
        return code, log.read().decode(errors="replace")


@pytest.fixture(scope="module")
def stopped(memory, request):
    return {how: stop(memory / how, how) for how in chosen(request, "how")}


@pytest.fixture(scope="module")
def told(memory, stopped, request):
    """All of them by one process, also what goes on after torchrun: importing takes longer than training."""
    return worker(memory, *chosen(request, "request_"), *(f"resume:{how}" for how in stopped))


@pytest.mark.parametrize("request_", [*KILLS, *map(full, MORE_KILLS)])
def test_killed_at_random_moments_nothing_is_lost(told, request_):
    """One process; one of two, under every kind of sharding: the bits of the training that was not killed."""
    found = told[request_]
    assert found["kills"] == int(request_.split(":")[1]) and found["trainings"] >= 1
    assert found["lost"] == 0
    assert found["hung"] == 0, "a process did not end after the other one was killed"


def test_the_kills_were_aimed_at_saves(told):
    kills = [found for request_, found in told.items() if request_.startswith("kills")]
    assert not kills or sum(found["during a save"] for found in kills) >= 1


@pytest.mark.parametrize("request_", [full("every"), "every:2:5"])
def test_killed_before_every_change_in_the_folder(told, request_):
    """Two steps, one checkpoint kept: the second save also deletes the first checkpoint."""
    assert told[request_]["kills"] >= (30 if request_ == "every" else 10) and told[request_]["lost"] == 0


@pytest.mark.parametrize("request_", [full("late")])
def test_a_process_killed_while_the_first_has_already_written_its_state(told, request_):
    """`trainer_state.json` of step 3 is there, the random numbers of the second process are not: step 2 counts."""
    found = told[request_]
    assert found["complete"] == 2 and found["resumed"] == [0, 0] and found["equal"]
    assert found["codes"][1] == -signal.SIGKILL and found["codes"][0] != 0


@pytest.mark.parametrize(
    "request_", [f"replace:{case}" if case in ONCE else full(f"replace:{case}") for case in REPLACED]
)
def test_killed_while_a_model_replaces_an_older_one(told, request_):
    """Single file, shards, adapter: the old or the new weights load, never a mixture."""
    found = told[request_]
    assert found["kills"] >= 8 and found["neither"] == 0 and found["left over"] == []
    assert found["old"] >= 1 and found["new"] >= 1


@pytest.mark.parametrize("request_", [full("terminate"), "terminate:2"])
def test_sigterm_saves_and_stops(told, request_):
    """Sent to one process of two, it stops both after the same step."""
    found, processes = told[request_], 1 if request_ == "terminate" else 2
    assert found["codes"] == [128 + signal.SIGTERM] * processes and 1 <= found["complete"] < STEPS
    assert found["resumed"] == [0] * processes and found["equal"]


@pytest.mark.parametrize("request_", ["agree"])
def test_an_error_of_the_first_process_is_one_of_all(told, request_):
    assert told[request_]["codes"] == [1, 1] and told[request_]["told"] == [True, True]
    assert told[request_]["seconds"] < 30, "they did not wait for each other"


# ---- a disk that takes no more ----


class AtSave(TrainerCallback):
    """From step 3 on no file may become larger than `size` bytes: the save of that step breaks off in the middle."""

    def __init__(self, size):
        self.size = size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def file_size_restored():
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # pytest's own files have grown beyond the limit
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def end(tmp_path_factory):
    """The weights of the training that nothing disturbs."""
    whole = make(tmp_path_factory.mktemp("whole"))
    whole.train()
    return weights(whole.model)


@pytest.mark.parametrize("size", [0, 4_000, 30_000], ids=["nothing", "part of the weights", "part of the optimizer"])
def test_a_save_that_breaks_off_leaves_the_earlier_checkpoint(tmp_path, size, end):
    trainer = make(tmp_path / "run", callbacks=[AtSave(size)])
    with file_size_restored(), pytest.raises(OSError, match=r"checkpoint-3.*untouched.*resume_from_checkpoint"):
        trainer.train()
    assert last_complete_checkpoint(str(tmp_path / "run")).endswith("checkpoint-2")
    assert trainer.args.save_total_limit == 1 and trainer.state.global_step == 3
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert distance(end, weights(resumed.model)) == 0


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    trainer = make(tmp_path, max_steps=4, save_total_limit=None)
    free = iter([10**12, 10**12, 100])  # before training, at the first save, at the second

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with pytest.raises(
        OSError, match=r"takes about [\d,]+ bytes and 100 are free.*Make room.*resume_from_checkpoint"
    ) as e:
        trainer.train()
    assert e.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    make(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_full_disk_is_said_before_training(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="100 are free"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("resume", [None, True])
def test_an_unwritable_directory_is_said_before_training(tmp_path, monkeypatch, resume):
    trainer = make(tmp_path / "run")

    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", kwargs["dir"])

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot be written .*Permission denied.*Pass another `output_dir`"):
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 0 and contents(tmp_path) == {}


def test_the_final_model_survives_a_save_that_breaks_off(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = contents(tmp_path)
    with file_size_restored(), pytest.raises(OSError, match=r"What was saved before is untouched.*make room"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        trainer.save_model()
    assert contents(tmp_path) == before


# ---- what can be resumed ----


def test_a_model_only_checkpoint_is_refused_by_name(tmp_path):
    make(tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"no optimizer state \(`save_only_model=True`\)"):
        make(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lost_a_file_is_refused_by_name(tmp_path):
    make(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"has been changed.*'optimizer.pt' is missing"):
        make(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_manifest_is_of_a_plain_trainer_and_resumed(tmp_path):
    make(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "blur_checkpoint.json").unlink()
    trainer = make(tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.log_history[0]["step"] == 1 and trainer.state.global_step == 4


def test_everything_is_on_disk_before_the_manifest_is_closed(tmp_path, monkeypatch):
    flushed, fsync, replace = set(), os.fsync, os.replace

    def remember(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source, target):
        if Path(target).name == "blur_checkpoint.json" and json.loads(Path(source).read_text())["files"]:
            names = [path for path in Path(target).parent.rglob("*") if path != Path(target)]
            assert len(names) > 5 and all(path.stat().st_ino in flushed for path in names)
            flushed.add("closed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "replace", check)
    make(tmp_path, max_steps=1).train()
    assert "closed" in flushed


# ---- which checkpoints stay ----


class Scores(TrainerCallback):
    """The second step's evaluation is the best one; notes which checkpoints there are after each save."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = [3.0, 1.0, 2.0, 4.0, 5.0][state.global_step - 1]

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(sorted(path.name[-1] for path in Path(args.output_dir).glob("checkpoint-*")))


@pytest.mark.parametrize(
    ("limit", "kept", "at_the_end"),
    [(1, ["1", "2", "23", "24", "25"], ["2"]), (2, ["1", "12", "23", "24", "25"], ["2", "5"])],
)
def test_rotation_keeps_the_best_checkpoint(tmp_path, limit, kept, at_the_end):
    """As Trainer does: the best and the newest one, and at the end of a limit of 1 the best one alone."""
    scores = Scores()
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 5}
    trainer = make(tmp_path, callbacks=[scores], eval_dataset=RETAIN, save_total_limit=limit, **best)
    trainer.train()
    assert scores.seen == [list(names) for names in kept]
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == at_the_end
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert distance(weights(trainer.model), saved) == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("left", ["nothing new yet", "a part of the new one", "the whole new one"])
def test_killed_while_a_checkpoint_replaces_one_of_the_same_step(tmp_path, left):
    """The older one stands aside under another name until the new one is complete."""
    constant = {"lr_scheduler_type": "constant"}  # any other depends on max_steps
    make(tmp_path / "run", max_steps=2, **constant).train()
    path, previous = (tmp_path / "run" / name for name in ("checkpoint-2", ".previous-checkpoint-2"))
    shutil.copytree(path, previous)
    if left == "nothing new yet":
        shutil.rmtree(path)
    elif left == "a part of the new one":
        (path / "model.safetensors").write_bytes(b"cut off")
        (path / "blur_checkpoint.json").write_text('{"files": null}')
    else:
        (previous / "model.safetensors").write_bytes(b"of a training before")
    whole, resumed = (make(tmp_path / name, max_steps=4, **constant) for name in ("whole", "run"))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[0]["step"] == 1 and resumed.state.global_step == 4
    assert distance(weights(whole.model), weights(resumed.model)) == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-4"]


def test_killed_while_an_unfinished_checkpoint_is_removed(tmp_path, monkeypatch):
    """What is left of it, without its open manifest, must not look like a checkpoint of a plain Trainer."""
    make(tmp_path, max_steps=2, save_total_limit=None).train()
    (tmp_path / "checkpoint-2" / "blur_checkpoint.json").write_text('{"files": null}')

    remove = shutil.rmtree

    def killed(path, *args, **kwargs):
        manifest = Path(path) / "blur_checkpoint.json"
        if not manifest.exists():  # a temporary folder of something else
            return remove(path, *args, **kwargs)
        manifest.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-1")
    monkeypatch.undo()
    make(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_of_the_same_step_is_kept_until_the_new_one_is_complete(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    before = contents(tmp_path / "checkpoint-2")
    trainer.checkpoints.begin(tmp_path / "checkpoint-2", writes=True)
    aside = contents(tmp_path / ".previous-checkpoint-2")
    assert {path.name: data for path, data in aside.items()} == {path.name: data for path, data in before.items()}
    assert json.loads((tmp_path / "checkpoint-2" / "blur_checkpoint.json").read_text()) == {"files": None}


@pytest.mark.parametrize("writer", ["ReportCallback", "save_state"])
def test_the_state_that_says_a_training_has_ended_is_whole_or_not_there(tmp_path, writer):
    """examples/run_muse.py skips a stage whose `trainer_state.json` exists."""
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    with file_size_restored(), pytest.raises(OSError, match="File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if writer == "save_state":
            trainer.save_state()
        else:
            ReportCallback().on_train_end(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "trainer_state.json").exists()
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


# ---- under torchrun ----


@pytest.mark.parametrize("how", ["SIGTERM", full("SIGKILL")])  # the launcher stops its processes in both
def test_torchrun(stopped, told, how):
    code, said = stopped[how]
    assert code != 0, said[-2000:]
    if how == "SIGTERM":  # after a SIGKILL torchrun sends one to the other process, which may not see it
        assert "SIGTERM: finishing this step" in said
    found = told[f"resume:{how}"]
    assert found["complete"] < STEPS and found["codes"] == [0, 0] and found["equal"]
