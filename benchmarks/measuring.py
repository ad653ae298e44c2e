"""What the benchmarks of training steps share: their options, turns, medians, and peaks of memory."""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import torch
from transformers.utils import logging


def step_options(
    doc: str | None, variants: Sequence[str], *, rounds: int, batch_size: int, length: int
) -> argparse.ArgumentParser:
    """How long, where and on what; `--memory-of` is for `memory_in_subprocess`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="examples per role")
    parser.add_argument("--length", type=int, default=length, help="tokens per example")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--no-memory", action="store_true", help="times only: memory takes a process per variant")
    parser.add_argument("--memory-of", choices=variants, help=argparse.SUPPRESS)
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line. From now on nothing else is printed, and the threads are those asked for."""
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does: use the wall clock")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    return options


def machine(device: str) -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}{load}"


def in_turns(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per variant, one entry per round, in rotating order: drift and load hit all of them."""
    variants = list(steps)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in range(rounds + 1):
        shift = round_ % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            elapsed = steps[variant]()
            if round_ >= 1:  # the first round makes AdamW's moments
                seconds[variant].append(elapsed)
    return seconds


def ratio(seconds: dict[str, list[float]], variant: str, base: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within a round."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(seconds[variant], seconds[base], strict=True)], n=4, method="inclusive"
    )
    return median, low, high


def resident(field: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at its highest since the last reset."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def held(device: str) -> int:
    """Bytes now, on the device or resident."""
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def peak(step: Callable[[], object], device: str) -> int:
    """Bytes at the highest, during three steps."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark, see proc(5)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def memory_in_subprocess(script: str, variant: str, options: argparse.Namespace, **others: object) -> int | None:
    """Bytes that the script prints for `--memory-of`. `None`: `--no-memory`, or the CPU's peak cannot be reset."""
    if options.no_memory or (options.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK)):
        return None
    command = [sys.executable, script, "--memory-of", variant]
    same = {name: getattr(options, name) for name in ("device", "threads", "batch_size", "length")}
    for name, value in (same | others).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])
