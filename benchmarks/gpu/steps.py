"""A step of Llamas with random weights in bfloat16, at .1, 1 and 3 billion parameters: time and memory.

    export PYTHONPATH=.:tests:benchmarks
    python benchmarks/gpu/steps.py
    python benchmarks/gpu/steps.py --sizes 1B --variants all
    python benchmarks/gpu/steps.py --sizes 1B --batch-size 4 --length 512 --variants "BLUR (ascent)" --profile profiles

The base is two steps of a plain `Trainer`, one on a batch of each role. Each variant takes turns with it in one
process, on a model of its own; the ratio is the median, over rounds, of the ratio within a round. Memory is torch's
highest count during a step, less what was held before the variant's model was built, beside `estimate_memory`.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from datasets import Dataset
from measuring import in_turns, machine, ratio
from rows import row, write_rows
from shapes import SHAPES, llama
from stepping import PINNED, Steps, rows
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
from transformers.utils import logging

from blur_trainer import BLURConfig, BLURTrainer, estimate_memory
from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.trainers.config import UnlearningConfig

STOCK, TWO = "two stock steps", "stock, accumulation 2"
ASCENT, NPO, KNOWN = {"forget_objective": "grad_ascent"}, {"forget_objective": "npo"}, {"precompute_ref_logps": True}
MAIN: dict[str, dict[str, Any]] = {
    "BLUR (ascent)": ASCENT,
    "BLUR-NPO, known logps": NPO | KNOWN,
    "GradDiff": ASCENT | {"rule": "sum"},
}
VARIANTS = MAIN | {
    TWO: {"gradient_accumulation_steps": 2},
    "BLUR-NPO, reference copy": NPO,
    "one buffer": NPO | KNOWN | {"single_gradient_buffer": True},
    "offloaded slot": NPO | KNOWN | {"offload_forget_gradient": True},
    "logits": NPO | KNOWN | {"fused_lm_head": False},
    "fused head": NPO | KNOWN | {"fused_lm_head": True},
    "checkpointing": NPO | KNOWN | {"activation_checkpointing": True},
}
ROUNDS = {"0.1B": 9, "1B": 7, "3B": 4}


def make(variant: str, config: LlamaConfig, options: argparse.Namespace, folder: str) -> Steps:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch_size,
        "use_cpu": options.device == "cpu",
        "dataloader_pin_memory": options.device == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-6,
        "max_length": options.length,
        **PINNED,  # the same for the base, whatever the device's defaults are
        **VARIANTS.get(variant, {}),
    }
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    clock = SimpleNamespace(device=options.device, clock="wall")
    if variant in (STOCK, TWO):
        both = Dataset.from_list(rows(options.length, seed=1) + rows(options.length, seed=2))
        collator = UnlearningCollator(pad_token_id=0)
        stock = Trainer(model, UnlearningConfig(**settings), train_dataset=both, data_collator=collator)
        steps = Steps.of(stock, clock)
        steps.micro_batches, steps.optimizer_steps = (2, 1) if variant == TWO else (1, 2)
        return steps
    # far below the model's own: the forget gradient of NPO is then that of ascent, and not 0
    known = {"ref_logps": -20.0 * options.length} if KNOWN.items() <= VARIANTS[variant].items() else {}
    data = rows(options.length, seed=1, **known), rows(options.length, seed=2)
    return Steps.of(BLURTrainer(model, BLURConfig(**settings), *data), clock)


def allocated(device: str, clear: bool = False) -> int:
    gc.collect()
    if device != "cuda":
        return 0
    if clear:
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(step: Callable[[], float], before: int, device: str) -> int:
    """Bytes at the highest point of a step above `before`; 0 on a CPU."""
    allocated(device)
    step()
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def compare(
    size: str, variant: str, config: LlamaConfig, stock: Steps, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one variant beside the base."""
    before = allocated(options.device, clear=True)
    with tempfile.TemporaryDirectory() as folder:
        steps = make(variant, config, options, folder)
        for _ in range(2):  # kernels are compiled, AdamW's moments made
            steps()
        seconds = in_turns({STOCK: stock, variant: steps}, options.rounds or ROUNDS.get(size, 2))
        highest = peak(steps, before, options.device)
        if options.profile:
            options.profile.mkdir(parents=True, exist_ok=True)
            name = f"{size}-{variant}".replace(", ", "-").replace(" ", "_")
            (options.profile / f"{name}.txt").write_text(profiled(steps.trainer, steps))
        if not all(p.isfinite().all().item() for p in steps.model.parameters()):
            raise FloatingPointError("weights are not finite")
        median, *spread = ratio(seconds, variant, STOCK)
        name, aim = f"{size}: {variant}", {"most": 1.0} if variant in MAIN else {}
        found = [row(name, median, f"of {STOCK}", spread=spread, **aim)]
        found += [row(f"{name}: a step", 1e3 * statistics.median(seconds[variant]), "ms")]
        if highest:
            found.append(row(f"{name}: peak memory", highest / 2**20, "MiB"))
        if highest and variant != TWO:
            estimate = estimate_memory(config, steps.trainer.args, dtype="bfloat16", device=options.device).total
            found.append(row(f"{name}: peak memory", highest / estimate, "of the estimate", least=0.9, most=1.1))
    return found


class Results:
    """Prints and writes rows as they come."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        for one in rows:
            spread = "-".join(f"{value:.2f}" for value in one.get("spread", []))
            missed = "   MISSED" if not one.get("met", True) else ""
            print(f"{one['what']:50} {one['value']:9.2f} {one['unit']} {spread}{missed}", flush=True)
        write_rows(self.path, self.rows, failed=self.failed)

    def fail(self, what: str, error: Exception) -> None:
        self.failed.append(f"{what}: {type(error).__name__}: {error}"[:500])
        print(f"FAILED {self.failed[-1]}", flush=True)
        self.add([])


def measure(size: str, config: LlamaConfig, options: argparse.Namespace, results: Results) -> None:
    """One size: the base, then each variant beside it. A variant that fails stops no other."""
    before = allocated(options.device, clear=True)
    with tempfile.TemporaryDirectory() as folder:
        stock = make(STOCK, config, options, folder)
        for _ in range(2):
            stock()
        highest = peak(stock, before, options.device)
        results.add([row(f"{size}: {STOCK}", 1e3 * statistics.median(stock() for _ in range(3)), "ms")])
        if highest:
            results.add([row(f"{size}: {STOCK}: peak memory", highest / 2**20, "MiB")])
        for variant in options.variants:
            try:
                results.add(compare(size, variant, config, stock, options))
            except Exception as error:  # noqa: BLE001
                results.fail(f"{size}: {variant}", error)


def profiled(trainer: Trainer, steps: Steps, count: int = 3) -> str:
    """Where the time of `count` steps goes: the phases of the backend, then kernels and what the host waits for."""
    backend = getattr(trainer, "_backend", None)
    for name in ("take", "gramian", "write", "_put", "backward"):
        if backend is not None:
            setattr(backend, name, record_function(f"## {name}")(getattr(backend, name)))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * torch.cuda.is_available())]
    with profile(activities=activities) as seen:
        for _ in range(count):
            steps()
    averages = seen.key_averages()
    order = ("self_device_time_total", "cpu_time_total") if torch.cuda.is_available() else ("self_cpu_time_total",)
    return "\n".join(averages.table(sort_by=key, row_limit=40, max_name_column_width=60) for key in order)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(ROUNDS), metavar="SIZE")
    parser.add_argument("--batch-size", type=int, default=2, help="examples per role")
    parser.add_argument("--length", type=int, default=1024, help="tokens per example")
    parser.add_argument("--rounds", type=int, help="default: by size")
    parser.add_argument("--variants", nargs="+", choices=["all", *VARIANTS], default=list(MAIN), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, short texts, two rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="a folder for a profile of each variant")
    options = parser.parse_args()
    options.variants = list(VARIANTS) if "all" in options.variants else options.variants
    sizes = {size: SHAPES[size] for size in options.sizes}
    if options.tiny:
        sizes, options.length, options.rounds = {"tiny": llama(64, 2)}, 16, 2
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    print(f"{machine(options.device)}\n{options.batch_size} x {options.length} tokens per role, bfloat16", flush=True)
    results = Results(options.json)
    for size, config in sizes.items():
        measure(size, config, options, results)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
