"""Real processes killed while they train and save: the directory they leave continues to the uninterrupted result."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKER = HERE / "fault_worker.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE)}
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
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


REQUESTS = ("kills:20:0", "kills:6:1:2", "every", "late", "replace", "terminate", "terminate:2", "agree")


@pytest.fixture(scope="module")
def told(memory):
    """All of them by one process: importing takes longer than training."""
    return worker(memory, *REQUESTS)


@pytest.mark.parametrize("request_", REQUESTS[:2], ids=["one process", "one of two"])
def test_killed_at_random_moments_nothing_is_lost(told, request_):
    found = told[request_]
    assert found["kills"] >= int(request_.split(":")[1]) and found["lost"] == 0
    assert found["trainings"] >= 1 and found["during a save"] >= 1, "the kills missed what they were for"


def test_killed_before_every_change_in_the_folder(told):
    """Two steps, one checkpoint kept: the second save also deletes the first checkpoint."""
    assert told["every"]["kills"] >= 30 and told["every"]["lost"] == 0


def test_a_process_killed_while_the_first_has_already_written_its_state(told):
    """`trainer_state.json` of step 3 is there, the random numbers of the second process are not: step 2 counts."""
    found = told["late"]
    assert found["complete"] == 2 and found["resumed"] == [0, 0] and found["equal"]
    assert found["codes"][1] == -signal.SIGKILL and found["codes"][0] != 0


def test_killed_while_a_model_replaces_an_older_one(told):
    """Single file and shards in all four combinations: the old or the new weights load, never a mixture."""
    found = told["replace"]
    assert found["kills"] >= 40 and found["neither"] == 0 and found["left over"] == []
    assert found["old"] > 4 and found["new"] > 4


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_stops(told, processes):
    """Sent to one process of two, it stops both after the same step."""
    found = told["terminate" if processes == 1 else "terminate:2"]
    assert found["codes"] == [3] * processes and 1 <= found["complete"] < STEPS
    assert found["resumed"] == [0] * processes and found["equal"]


def test_an_error_of_the_first_process_is_one_of_all(told):
    assert told["agree"]["codes"] == [1, 1] and told["agree"]["told"] == [True, True]
    assert told["agree"]["seconds"] < 30, "they did not wait for each other"


# ---- under torchrun ----


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "SIGKILL to a process"])
def test_torchrun(memory, how):
    folder = memory / how.replace(" ", "-")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryFile() as log:
        command = [*launcher, str(WORKER), str(folder), "train"]
        launched = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not list((folder / "run").glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
                time.sleep(0.02)
            if how.startswith("SIGTERM"):
                launched.send_signal(signal.SIGTERM)
            else:
                os.kill(int((folder / "process-1").read_text()), signal.SIGKILL)
            code = launched.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                launched.kill()
            launched.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    assert code != 0, said[-2000:]
    assert ("SIGTERM: finishing this step" in said) == how.startswith("SIGTERM")
    found = worker(folder, "resume")["resume"]
    assert found["complete"] < STEPS and found["codes"] == [0, 0] and found["equal"]
    shutil.rmtree(folder)
