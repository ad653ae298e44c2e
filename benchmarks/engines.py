"""What a BLUR step costs over two stock steps, engine by engine: DDP, FSDP2, every ZeRO stage. Exit code 1 above 1.10.

    python benchmarks/engines.py                                 # two CPU processes per engine, some minutes
    python benchmarks/engines.py --engines ddp zero3 --size 15M --clock wall --json engines.json

Each engine is launched on its own. In it, a plain `Trainer` and a `BLURTrainer` with the same engine arguments take
turns, step by step, as in `step_cost.py`: two steps with one loss each against one step with two losses, on the same
tokens. A ratio is the median over rounds of the ratio within a round.

Two clocks. `cpu` (default): CPU seconds of all processes together, copies and the network stack included. It counts
work, whatever else the machine does meanwhile, but no waiting; what is sent over a network is the same in both, except
that BLUR gathers ZeRO 1's and 2's parameters once less and sends three numbers more. `wall`: the slowest process's time
on the wall; right on a machine that has a core for each process and nothing else to do.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import machine, ratio
from stepping import BLUR_GA, SIZES, STOCK, Steps
from torch import distributed
from transformers import training_args
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.parity import ENGINES, ONLY, forget_engine, torchrun

MEASURED = [engine for engine in ENGINES if engine != "fsdp2_lean"]  # it loads in another way than fsdp2; steps alike
LIMIT = 1.10


# ---- one of the processes of one engine ----


def build(variant: str, engine: str, options: argparse.Namespace, folder: str) -> Steps:
    arguments = copy.deepcopy(ENGINES[engine])
    if ONLY.get(engine) == {"bf16"}:
        training_args.is_torch_bf16_gpu_available = lambda: True  # else transformers allows none beside an engine
        arguments["bf16"] = True
    forget_engine()
    return Steps(variant, options.size, options, folder, **arguments)


def time_engine(engine: str, options: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    """Seconds of this process per variant, one entry per round."""
    variants = [STOCK, BLUR_GA]
    steps = {variant: build(variant, engine, options, folder) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in range(options.rounds + 2):
        for variant in variants if round_ % 2 else variants[::-1]:
            distributed.barrier()
            elapsed = steps[variant]()
            if round_ >= 2:  # the first rounds make AdamW's moments, and ZeRO 3 learns the order of the layers
                seconds[variant].append(elapsed)
    return seconds


def work(folder: str, engine: str, settings: str) -> None:
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    seconds = time_engine(engine, types.SimpleNamespace(**json.loads(settings)), folder)  # type: ignore[arg-type]
    Path(folder, f"{distributed.get_rank()}.json").write_text(json.dumps(seconds))
    distributed.barrier()
    os._exit(0)  # gloo aborts an exit now and then, after everything is written


# ---- report ----


def measure(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torchrun(__file__, "--work", folder, engine, json.dumps(vars(options)), processes=options.processes)
        parts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    together = sum if options.clock == "cpu" else max
    seconds = {
        name: [together(turn) for turn in zip(*(part[name] for part in parts), strict=True)] for name in parts[0]
    }
    median, low, high = ratio(seconds, BLUR_GA, STOCK)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "engine": engine,
        "stock_ms": milliseconds[STOCK],
        "blur_ms": milliseconds[BLUR_GA],
        "ratio": median,
        "quartiles": [low, high],
        "met": median <= LIMIT,
    }


def line(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    return (
        f"{row['engine']:18} {row['stock_ms']:14.1f} {row['blur_ms']:10.1f} {row['ratio']:7.3f} {low:7.3f}-{high:.3f}"
        f"  {'met' if row['met'] else f'MISSED {LIMIT:.2f}'}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--size", choices=list(SIZES), default="2M", help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2, help="examples per role and process")
    parser.add_argument("--length", type=int, default=64, help="tokens per example")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    options.device = "cpu"
    return options


def main() -> int:
    options = parse_arguments()
    before = machine("cpu")
    load = f"{options.size} model, {options.batch_size} x {options.length} tokens per role and process"
    print(f"{before}\n{options.processes} processes, {options.rounds} rounds, {load}, {options.clock} clock\n")
    print(f"{'':18} {'2 stock steps':>14} {'BLUR':>10} {'ratio':>7} {'quartiles':>13}", flush=True)
    rows = []
    for engine in options.engines:
        rows.append(measure(engine, options))
        print(line(rows[-1]), flush=True)
    print(f"At the end: {machine('cpu')}")
    if options.json:
        report = {"machine": before, "settings": vars(options), "limit": LIMIT, "engines": rows}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5])
    sys.exit(main())
