"""One training at a time in a folder: who is refused, what the message says, and what a kill leaves."""

import contextlib
import json
import os
import signal
import socket
import sys
from subprocess import PIPE, Popen

import pytest
from support.models import examples, tiny_llama
from support.processes import ENVIRONMENT
from support.runs import settings
from transformers import TrainerCallback

from blur_trainer.saving import lock as locking
from blur_trainer.saving.lock import LOCK_NAME, OutputLock
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN = examples(2), examples(2, 1)
# takes the lock, leaves a worker behind as a dataloader does, and waits to be killed
HOLDER = """
import os, sys, time
from blur_trainer.saving.lock import OutputLock
OutputLock().acquire(sys.argv[1])
there, here = os.pipe()
if os.fork() == 0:
    os.write(here, b"x")
    os.closerange(0, 3)
    time.sleep(60)
    os._exit(0)
os.read(there, 1)
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def taken(folder):
    lock = OutputLock()
    lock.acquire(str(folder))
    try:
        yield lock
    finally:
        lock.release(remove=True)


def test_the_other_one_is_named(tmp_path):
    with taken(tmp_path), pytest.raises(ValueError, match="is in use") as raised:
        OutputLock().acquire(str(tmp_path))
    message = str(raised.value)
    for word in (str(tmp_path), f"process {os.getpid()} on {socket.gethostname()}, since 20", "`output_dir`"):
        assert word in message
    assert list(tmp_path.iterdir()) == []
    with taken(tmp_path) as lock:  # free again
        assert not lock.broke_off


def test_a_holder_that_has_not_written_its_name(tmp_path):
    with taken(tmp_path):
        (tmp_path / LOCK_NAME).write_text("")
        with pytest.raises(ValueError, match="in use: another process, trains there"):
            OutputLock().acquire(str(tmp_path))


def test_a_kill_leaves_no_lock_but_a_trace(tmp_path):
    """Not even where a forked worker of the killed process still lives."""
    with Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=ENVIRONMENT, stdout=PIPE, start_new_session=True
    ) as p:
        try:
            assert p.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=f"process {p.pid} on"):
                OutputLock().acquire(str(tmp_path))
            os.kill(p.pid, signal.SIGKILL)
            p.wait(30)
            with taken(tmp_path) as lock:
                assert lock.broke_off
                assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        finally:
            os.killpg(p.pid, signal.SIGKILL)


def test_a_lock_file_that_is_removed_in_between_is_taken_anew(tmp_path, monkeypatch):
    """The other training ends between our opening its file and our locking it: that file locks nothing any more."""
    flock, ends = locking.fcntl.flock, [True]

    def late(descriptor, how):
        if ends and ends.pop():
            (tmp_path / LOCK_NAME).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(locking.fcntl, "flock", late)
    with taken(tmp_path), pytest.raises(ValueError, match="in use"):
        OutputLock().acquire(str(tmp_path))


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    with taken(tmp_path):
        assert "cannot be locked" in caplog.text and str(tmp_path) in caplog.text


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        OutputLock().acquire(str(tmp_path))
    assert (tmp_path / "mine").read_text() == "precious"


class Second(TrainerCallback):
    """In the middle of a training, another one in the same folder."""

    def __init__(self, start):
        self.start, self.told = start, []

    def on_step_end(self, args, state, control, **kwargs):
        for resume in (None, True):
            with pytest.raises(ValueError, match="in use: process") as raised:
                self.start().train(resume_from_checkpoint=resume)
            self.told.append(str(raised.value))


def test_a_second_training_in_the_folder_is_refused_until_the_first_has_ended(tmp_path):
    def start(*callbacks, seed=0):
        args = settings(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
        return BLURTrainer(tiny_llama(seed), args, FORGET, RETAIN, callbacks=list(callbacks))

    second = Second(start)
    start(second).train()
    assert len(second.told) == 2 and [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    start().train(resume_from_checkpoint=True)  # its folder is free


def test_a_folder_that_cannot_be_made_is_told_at_construction(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot be written .*Nothing has been trained.*Pass another `output_dir`"):
            BLURTrainer(tiny_llama(), settings(folder), FORGET, RETAIN)
