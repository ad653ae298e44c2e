"""Tests that start processes: what these see of the machine, torchrun, and a quicker launcher for many short trainings.

They import this checkout's package, wherever it is installed from.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
SUPPORT = TESTS / "support"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")])),
}


def freeze_imports() -> None:
    """Spares what is imported by now from garbage collection: each training begins with one, which takes longer."""
    gc.collect()
    gc.freeze()


def torchrun(script: Path | str, *arguments: str, processes: int = 2, **environment: str) -> None:
    """Several processes on this machine's CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    finish([*command, str(script), *arguments], environment)


def forked(script: Path | str, *arguments: str, processes: int = 2, **environment: str) -> None:
    """As `torchrun`, but one process imports for all: importing takes longer than most trainings do."""
    finish([sys.executable, str(SUPPORT / "forking.py"), str(processes), str(script), *arguments], environment)


def finish(command: list[str], environment: dict[str, str]) -> None:
    environment = ENVIRONMENT | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the training processes failed:\n{done.stderr[-6000:]}")
