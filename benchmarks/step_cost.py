"""What a BLUR step costs, in time and memory, against plain fine-tuning steps on the same model and batches.

    python benchmarks/step_cost.py                      # CPU: three sizes, about three minutes on two cores
    python benchmarks/step_cost.py --device cuda --sizes 350M 1B --batch-size 4 --length 512 --json costs.json

Time. Every variant is a real trainer; its optimizer step is driven as `Trainer`'s own loop does (get_batch_samples,
training_step, clipping, AdamW, scheduler, zero_grad). Per round each variant takes one step, in rotating order, so that
drift and load hit all of them; a ratio is the median over rounds of the ratio within a round. On a machine that does
other work too, `--clock cpu --threads 1` counts this process's CPU seconds instead of the time on the wall.

Memory. Each variant runs alone in a fresh process. What a step needs is the peak during it, less what is held between
steps (weights, AdamW's moments, the interpreter). CPU (Linux): resident memory and the kernel's high-water mark of it,
reset after two warm-up steps, malloc set to return freed blocks at once. CUDA: torch's counters of allocated memory.
The unit is one copy of the gradients.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from stepping import BLUR_GA, BLUR_NPO, GRAD_DIFF, ONE_BUFFER, PASSES, SIZES, STOCK, VARIANTS, Steps, build_model
from transformers.utils import logging

MEMORY_VARIANTS = (STOCK, PASSES, GRAD_DIFF, BLUR_GA, ONE_BUFFER, BLUR_NPO)


def time_size(size: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per variant, one entry per round."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        steps = {variant: Steps(variant, size, options, folder) for variant in VARIANTS}
        for round_ in range(options.rounds + 1):
            shift = round_ % len(VARIANTS)
            for variant in VARIANTS[shift:] + VARIANTS[:shift]:
                elapsed = steps[variant]()
                if round_ >= 1:  # the first round makes AdamW's moments
                    seconds[variant].append(elapsed)
    return seconds


# ---- memory: one variant in this process ----


def resident(field: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at its highest since the last reset."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def step_bytes(variant: str, size: str, options: argparse.Namespace) -> int:
    """Peak during a step, less what is held between steps."""
    cuda = options.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        step = Steps(variant, size, options, folder)
        step(), step()
        gc.collect()
        held = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark, see proc(5)
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - held


def memory_in_subprocess(variant: str, size: str, options: argparse.Namespace) -> int | None:
    """`None` where the CPU's peak cannot be reset: not Linux, or a container that forbids it."""
    if options.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    command = [sys.executable, __file__, "--memory-of", variant, "--sizes", size, "--device", options.device]
    command += ["--threads", str(options.threads)]
    command += ["--batch-size", str(options.batch_size), "--length", str(options.length)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


# ---- report ----


def ratio(seconds: dict[str, list[float]], variant: str, base: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within a round."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(seconds[variant], seconds[base], strict=True)], n=4, method="inclusive"
    )
    return median, low, high


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    parameters = sum(p.numel() for p in build_model(size).parameters())
    seconds = time_size(size, options)
    peaks = {variant: memory_in_subprocess(variant, size, options) for variant in MEMORY_VARIANTS}
    result: dict[str, Any] = {"size": size, "parameters": parameters, "gradient_bytes": 4 * parameters, "variants": {}}
    for variant in VARIANTS:
        median, low, high = ratio(seconds, variant, STOCK)
        peak, base = peaks.get(variant), peaks[STOCK]
        result["variants"][variant] = {
            "median_ms": 1e3 * statistics.median(seconds[variant]),
            "over_stock": median,
            "quartiles": [low, high],
            "step_mib": None if peak is None else peak / 2**20,
            "extra_gradient_copies": None if peak is None or base is None else (peak - base) / (4 * parameters),
        }
    result["npo_over_ascent"] = ratio(seconds, BLUR_NPO, BLUR_GA)
    return result


def table(result: dict[str, Any]) -> str:
    gradient = result["gradient_bytes"] / 2**20
    lines = [
        f"\n{result['size']}: {result['parameters'] / 1e6:.1f} M parameters, one gradient copy = {gradient:.0f} MiB",
        f"{'':34} {'ms':>8} {'x stock':>8} {'quartiles':>13} {'step MiB':>9} {'extra copies':>13}",
    ]
    for name, row in result["variants"].items():
        low, high = row["quartiles"]
        memory = f"{'-':>9} {'-':>13}"
        if row["step_mib"] is not None:
            memory = f"{row['step_mib']:9.0f} {row['extra_gradient_copies']:13.2f}"
        lines.append(f"{name:34} {row['median_ms']:8.1f} {row['over_stock']:8.3f} {low:6.3f}-{high:.3f} {memory}")
    return "\n".join(lines)


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    def line(what: str, values: list[float | None], limit: float, tolerance: float = 0.0) -> str:
        if any(value is None for value in values):
            return f"not measured  {what}"
        shown = ", ".join(f"{r['size']} {value:.3f}" for r, value in zip(results, values, strict=True))
        met = all(value <= limit + tolerance for value in values if value is not None)
        return f"{'met' if met else 'MISSED':13} {what} <= {limit}: {shown}"

    def column(variant: str, key: str) -> list[float | None]:
        return [r["variants"][variant][key] for r in results]

    # stock accumulation, too, has a whole gradient beside the activations of its second pass
    pairs = zip(*(column(variant, "extra_gradient_copies") for variant in (ONE_BUFFER, PASSES)), strict=True)
    over_accumulation = [None if one is None or stock is None else one - stock for one, stock in pairs]
    noise = 0.02  # resident memory comes in pages, and the interpreter allocates too
    return [
        line("time, BLUR / two stock steps", column(BLUR_GA, "over_stock"), 1.05),
        line("time, BLUR-NPO precomputed / two stock steps", column(BLUR_NPO, "over_stock"), 1.05),
        line("time, NPO precomputed / gradient ascent", [r["npo_over_ascent"][0] for r in results], 1.05),
        line("memory, BLUR over stock in gradient copies", column(BLUR_GA, "extra_gradient_copies"), 1.0, noise),
        line("time, one buffer / two stock steps", column(ONE_BUFFER, "over_stock"), 1.8),
        line("memory, one buffer over stock accumulation, copies", over_accumulation, 0.0, noise),
        line("memory, BLUR-NPO precomputed over stock, copies", column(BLUR_NPO, "extra_gradient_copies"), 1.0, noise),
    ]


def machine(device: str) -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}{load}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: 2M 15M 60M (CUDA: 60M 350M 1B)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=2, help="examples per role")
    parser.add_argument("--length", type=int, default=64, help="tokens per example")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--memory-of", choices=MEMORY_VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does: use the wall clock")
    options.sizes = options.sizes or (["60M", "350M", "1B"] if options.device == "cuda" else ["2M", "15M", "60M"])
    return options


def main() -> None:
    options = parse_arguments()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(step_bytes(options.memory_of, options.sizes[0], options))
        return
    before = machine(options.device)
    work = f"{options.batch_size} x {options.length} tokens per role, float32"
    print(f"{before}\n{options.rounds} rounds, {work}, {options.clock} clock")
    results = []
    for size in options.sizes:
        results.append(measure(size, options))
        print(table(results[-1]), flush=True)
    print("\n" + "\n".join(verdicts(results)))
    print(f"At the end: {machine(options.device)}")
    if options.json:
        report = {"machine": before, "settings": vars(options), "sizes": results, "verdicts": verdicts(results)}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
