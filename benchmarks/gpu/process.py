"""Runs one section: a process with a limit in seconds, ended with all that it started. What it prints is logged."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from sections import ROOT

RUNNING: set[int] = set()


def environment(device: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    more = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        **{"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_BUILD_OPS": "0"},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    if device == "cpu":
        more |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | more


def end(process: int) -> None:
    """With all that it started: torchrun gives its workers sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        section = psutil.Process(process)
        for one in [*section.children(recursive=True), section]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def stop(*_: Any) -> None:
    """Told to end: so does everything that was started. What results.json has so far stays."""
    for process in list(RUNNING):
        end(process)
    os._exit(124)


class Log:
    """What the sections print, on the screen and in the file, line by line with the section's name."""

    def __init__(self, path: Path):
        self.file, self.lock = path.open("w", encoding="utf-8"), threading.Lock()

    def __call__(self, name: str, line: str) -> None:
        with self.lock:
            for out in (sys.stdout, self.file):
                print(f"[{name}] {line.rstrip()}", file=out, flush=True)


def perform(
    name: str, what: str, command: list[str], limit: float, device: str, path: Path, log: Log
) -> dict[str, Any]:
    """Verdict (`passed`, `failed`, `cut off`), seconds, and what the section wrote to `path`, even when cut off."""
    command = [part.format(device=device, json=path) if part in ("{device}", "{json}") else part for part in command]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    RUNNING.add(process.pid)
    cut = threading.Event()
    timer = threading.Timer(limit, lambda: (cut.set(), end(process.pid)))
    timer.start()
    kept = []
    for line in process.stdout or ():
        log(name, line)
        kept.append(line.rstrip())
    process.wait()
    timer.cancel()
    RUNNING.discard(process.pid)
    verdict = "cut off" if cut.is_set() else "passed" if process.returncode == 0 else "failed"
    result: dict[str, Any] = {"what": what, "verdict": verdict, "seconds": round(time.monotonic() - start, 1)}
    with contextlib.suppress(OSError, ValueError):
        result["json"] = json.loads(path.read_text())
    if "json" not in result or verdict != "passed":
        result["output"] = kept[-60:]
    log(name, f"== {verdict}, {result['seconds']} s")
    return result
