"""Trainings that are killed. One process imports everything and forks, so that a kill costs no import.

    python tests/fault_worker.py kills FOLDER COUNT SEED [PROCESSES]   SIGKILL at random moments; prints what happened
    python tests/fault_worker.py every FOLDER                          SIGKILL before every single change in the folder
    python tests/fault_worker.py train FOLDER                          one training, alone or under torchrun
"""

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import examples, tiny_llama
from runs import settings
from transformers import TrainerCallback

from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.checkpoints import last_complete_checkpoint

FORGET, RETAIN = examples(7), examples(5, 1)
INTERRUPTED = 3  # the exit code after SIGTERM
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # and "open" for writing


def make(folder: Path, callbacks: list[TrainerCallback] | None = None, **config: Any) -> BLURTrainer:
    """A checkpoint each step, only one kept: nothing to fall back on if it is lost."""
    defaults = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    args = settings(folder, **(defaults | {"ddp_find_unused_parameters": False} | config))
    return BLURTrainer(tiny_llama(dropout=0.2), args, FORGET, RETAIN, callbacks=callbacks)


def run(folder: Path, begins: Callable[[], None] = lambda: None, **config: Any) -> int:
    """Starts or continues the training and saves the model; what a user's script does."""
    begun = folder.exists() and any(folder.iterdir())
    trainer = make(folder, **config)
    begins()
    trainer.train(resume_from_checkpoint=True if begun else None)
    if trainer.interrupt.interrupted:
        return INTERRUPTED
    trainer.save_model()
    return 0


def forked(work: Callable[[], int], log: Path, **environment: str) -> int:
    """`work` in a child, its exit code what `work` returns; the child's id."""
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    code = 1
    try:
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def waited(child: int, seconds: float = 60.0) -> int | None:
    """The exit code, negative for a signal; None if it still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Launch:
    """One training in `processes` forked processes, which tell through a pipe when training begins."""

    def __init__(self, folder: Path, processes: int = 1, before: Callable[[int], None] = lambda rank: None):
        ready, told = os.pipe()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.children = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}

            def work(rank: int = rank) -> int:
                before(rank)
                return run(folder, lambda: os.close(told), use_cpu=True)

            environment = ranks | network if processes > 1 else {}
            self.children.append(forked(work, folder.with_suffix(f".{rank}.log"), **environment))
        os.close(told)
        os.read(ready, 1)  # ends when every process has closed it
        os.close(ready)

    def finished(self, seconds: float = 60.0) -> list[int | None]:
        return [waited(child, seconds) for child in self.children]

    def killed(self, rank: int) -> list[int | None]:
        """SIGKILL to one of them; the others end by themselves, or are killed as a launcher would."""
        kill(self.children[rank])
        codes = []
        for child in self.children:
            code = waited(child, 5.0)
            if code is None:
                kill(child)
                code = waited(child)
            codes.append(code)
        return codes


def newest(folder: Path) -> int:
    try:
        return int(last_complete_checkpoint(str(folder)).rsplit("-", 1)[1])
    except ValueError:
        return 0


def outcome(folder: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The final weights, byte by byte, and the log, without what depends on the clock."""
    (checkpoint,) = folder.glob("checkpoint-*")
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if leftovers:
        raise AssertionError(f"left behind: {leftovers}")
    return (folder / "model.safetensors").read_bytes(), [entry for entry in history if "loss" in entry]


def uninterrupted(folder: Path, processes: int = 1) -> tuple[Any, float]:
    launch, start = Launch(folder, processes), time.monotonic()
    codes = launch.finished()
    if any(codes):
        raise AssertionError(f"exit codes {codes}: {folder.with_suffix('.0.log').read_text()[-3000:]}")
    return outcome(folder), time.monotonic() - start


def kills(folder: Path, count: int, seed: int, processes: int = 1) -> dict[str, Any]:
    """Trainings killed again and again until they end; each must end where the uninterrupted one does."""
    folder.mkdir(parents=True, exist_ok=True)
    expected, seconds = uninterrupted(folder / "whole", processes)
    dice = random.Random(seed)
    told = {"kills": 0, "trainings": 0, "during a save": 0, "before the first checkpoint": 0, "lost": 0}
    while told["kills"] < count:
        current, step = folder / f"run-{told['trainings']}", 0
        while True:
            launch = Launch(current, processes)
            time.sleep(dice.uniform(0, 0.7 * seconds))
            codes = launch.killed(dice.randrange(processes))
            if -signal.SIGKILL in codes:
                told["kills"] += 1
                told["during a save"] += len(list(current.glob("checkpoint-*"))) > (newest(current) > 0)
                told["before the first checkpoint"] += newest(current) == 0
            elif any(codes):
                raise AssertionError(f"exit codes {codes}, see {current}.*.log")
            told["lost"] += newest(current) < step
            step = newest(current)
            if not any(codes):
                break
        told["lost"] += outcome(current) != expected
        told["trainings"] += 1
    return told


def changes(folder: Path, kill_at: int | None) -> list[str]:
    """Counts this process's changes in `folder` from now on; before the one numbered `kill_at` it is gone."""
    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in CHANGES or (event == "open" and len(arguments) > 2 and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(folder) in str(arguments[0]):
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{event} {Path(str(arguments[0])).relative_to(folder)}")

    sys.addaudithook(watch)
    return seen


def every(folder: Path) -> dict[str, Any]:
    """One training per change that it makes to the folder, killed right before it, then continued to the end."""
    folder.mkdir(parents=True, exist_ok=True)
    expected, _ = uninterrupted(folder / "whole")
    told = {"kills": 0, "lost": 0}
    while True:
        current = folder / f"run-{told['kills']}"
        codes = Launch(current, before=lambda rank: changes(current, told["kills"]) and None).finished()
        if codes == [0]:
            return told
        if codes != [-signal.SIGKILL]:
            raise AssertionError(f"exit codes {codes}, see {current}.*.log")
        told["kills"] += 1
        told["lost"] += Launch(current).finished() != [0] or outcome(current) != expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *numbers = sys.argv[1:]
    if what == "train":
        from accelerate import PartialState

        left = run(Path(where))
        PartialState().wait_for_everyone()
        os._exit(left)
    print(json.dumps(kills(Path(where), *map(int, numbers)) if what == "kills" else every(Path(where))))
