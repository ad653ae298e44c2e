"""Memory of real trainings against `blur_trainer.estimate_memory`.

    python benchmarks/memory.py                    # measured on this CPU / estimated, exit code 1 if one is off
    python benchmarks/memory.py --device cuda      # on a GPU, and what 8B-shaped Llamas need

Each case trains in a process of its own with `Trainer.train`. Measured is the highest point of the third optimizer
step, less what was held before the model was built (after another, tiny training: libraries load themselves late).
CPU (Linux): resident memory and the kernel's high-water mark of it. CUDA: torch's counters of allocated memory.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import machine, resident
from memory_cases import CASES, HEADLINES, Case, supported
from rows import row, write_rows
from shapes import llama
from stepping import rows
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging

from blur_trainer.trainers.blur import BLURTrainer

LOW, HIGH = 0.9, {"cpu": 1.15, "cuda": 1.1}  # resident memory comes in pages, and the interpreter allocates too
STEPS = 3

# ---- one case in this process ----


class Peak(TrainerCallback):
    """The highest point of the last step."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark, see proc(5)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bytes = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")


def run(case: Case, device: str) -> int:
    """Bytes at the highest point of a step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(case.config, dtype=getattr(torch, case.dtype))
        peak = Peak(device)
        data = [rows(case.length, seed=seed)[: STEPS * case.batch_size * case.accumulation] for seed in (1, 2)]
        arguments = case.arguments(device, folder)
        BLURTrainer(model, arguments, *data, peft_config=case.peft_config(), callbacks=[peak]).train()
    return peak.bytes


def measure(case: Case, device: str) -> int:
    tiny = llama(32, case.config.num_hidden_layers)  # settings may name layers
    run(Case(tiny, case.settings, case.dtype, case.lora, length=16), device)
    gc.collect()
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    return run(case, device) - before


def measure_in_subprocess(name: str, device: str) -> int:
    command = [sys.executable, __file__, "--measure", name, "--device", device]
    # freed blocks go back at once, or the process keeps them
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def ratio(name: str, measured: int, estimated: int, device: str) -> dict[str, Any]:
    return row(f"{name}: peak memory", measured / estimated, "of the estimate", least=LOW, most=HIGH[device])


def compare(names: list[str], device: str, jobs: int = 1) -> tuple[bool, list[dict[str, Any]]]:
    """Prints one line per case; whether all ratios are as they should be, and the rows."""
    print(f"{machine(device)}\n{'':42} {'measured':>9} {'estimated':>9} {'ratio':>6}   MiB")
    good, found = True, []
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(measure_in_subprocess, name, device) for name in names]
        for name, future in zip(names, running, strict=True):
            estimated = CASES[name].estimate(device).total
            if future.exception():
                print(f"{name:42} failed: {future.exception()}", flush=True)
                good = False
                continue
            measured = future.result()
            found.append(ratio(name, measured, estimated, device))
            off = not found[-1]["met"]
            good &= not off
            numbers = f"{measured / 2**20:9.0f} {estimated / 2**20:9.0f} {measured / estimated:6.2f}"
            print(f"{name:42} {numbers}{'   OFF' if off else ''}", flush=True)
    return good, found


def headlines(device: str, names: list[str]) -> tuple[bool, list[dict[str, Any]]]:
    """The two targets: measured on a GPU, else estimated and said so."""
    good, found = True, []
    for name in names:
        case = HEADLINES[name]
        estimated = case.estimate("cuda").total
        measured = measure_in_subprocess(name, device) if device == "cuda" else None
        size = "peak memory" if measured else "estimated memory, not measured"
        new = [row(f"{name}: {size}", (measured or estimated) / 1e9, "GB", most=case.limit)]
        if measured:
            new.append(ratio(name, measured, estimated, device))
        good &= all(one["met"] for one in new)
        found += new
        shown = f"estimated {estimated / 1e9:.1f} GB, " + (
            f"measured {measured / 1e9:.1f} GB" if measured else "not measured"
        )
        within = "" if new[-1]["met"] else "   OFF"
        print(f"{'met' if new[0]['met'] else 'MISSED':6} {name}, {case.optim} <= {case.limit} GB: {shown}{within}")
    return good, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), metavar="NAME", help="default: all")
    parser.add_argument("--headlines", nargs="*", choices=list(HEADLINES), default=list(HEADLINES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time: on a GPU its counters are per process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=[*CASES, *HEADLINES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.measure:
        torch.set_num_threads(1)
        print(measure((CASES | HEADLINES)[options.measure], options.device))
        return 0
    wanted = CASES if options.cases is None else options.cases
    good, found = True, []
    if names := [name for name in wanted if supported(CASES[name], options.device)]:
        good, found = compare(names, options.device, options.jobs)
        write_rows(options.json, found)
    met_, more = headlines(options.device, options.headlines)
    write_rows(options.json, found + more)
    return 0 if good and met_ else 1


if __name__ == "__main__":
    sys.exit(main())
