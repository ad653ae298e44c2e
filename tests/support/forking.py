"""Several processes for a script of this folder: one process imports what the script imports, then forks all of them.

python tests/support/forking.py PROCESSES SCRIPT ARGUMENT...

They see what they would see under torchrun: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. The script runs as
`__main__` in each. If one fails, the others are ended, and so is this process, with 1.
"""

import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


def child(rank: int, environment: dict[str, str], script: Path, arguments: list[str]) -> int:
    """The process id."""
    started = os.fork()
    if started:
        return started

    def work() -> int:
        os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        sys.argv = [str(script), *arguments]
        gc.enable()
        runpy.run_path(str(script), run_name="__main__")
        return 0

    exit_after(work)


def exit_after(work: Callable[[], int]) -> NoReturn:
    """Ends a forked process by the code that `work` gives, 1 if it fails: nothing may go on in the parent's code."""
    code = 1
    try:
        code = work()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(processes: int, script: Path, arguments: list[str]) -> int:
    gc.disable()  # what is imported stays: looking for garbage in it is a quarter of the time
    importlib.import_module(f"support.{script.stem}")
    if find_spec("deepspeed"):
        importlib.import_module("deepspeed")
    gc.freeze()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    environment["LOCAL_WORLD_SIZE"] = str(processes)
    running = {child(rank, environment, script, arguments) for rank in range(processes)}
    failed = False
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)  # it may wait for the one that failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
