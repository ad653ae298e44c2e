"""A step of a Llama of 1B's shape with random weights in bfloat16: milliseconds and memory against plain `Trainer`.

    python benchmarks/gpu/steps.py
    python benchmarks/gpu/steps.py --batch-size 4 --length 512 --variants stock "two slots, NPO"

Variants run one after the other, each on a fresh model; `stock` runs once more at the end, to see the card drift. Time
is the median of the steps, against two of `stock`: a BLUR step takes a forget and a retain batch. Memory is torch's
highest count during a step, less what was held before the model was built, beside `estimate_memory` for these settings.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from datasets import Dataset
from memory import LARGE, llama
from stepping import Steps, rows
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
from transformers.utils import logging

from blur_trainer import BLURConfig, BLURTrainer, estimate_memory
from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.trainers.config import UnlearningConfig

STOCK, TWO = "stock", "stock, accumulation 2"
ASCENT, NPO, KNOWN = {"forget_objective": "grad_ascent"}, {"forget_objective": "npo"}, {"precompute_ref_logps": True}
VARIANTS: dict[str, dict[str, Any]] = {
    STOCK: {},
    TWO: {"gradient_accumulation_steps": 2},
    "two slots, ascent": ASCENT,
    "two slots, NPO, known logps": NPO | KNOWN,
    "two slots, NPO, reference copy": NPO,
    "one buffer, NPO, known logps": NPO | KNOWN | {"single_gradient_buffer": True},
    "offloaded slot, NPO, known logps": NPO | KNOWN | {"offload_forget_gradient": True},
    "logits, NPO, known logps": NPO | KNOWN | {"fused_lm_head": False},
    "checkpointing, NPO, known logps": NPO | KNOWN | {"activation_checkpointing": True},
    "stock again": {},
}


def make(variant: str, config: LlamaConfig, options: argparse.Namespace, folder: str) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch_size,
        "use_cpu": options.device == "cpu",
        "dataloader_pin_memory": options.device == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-6,
        "max_length": options.length,
        **VARIANTS[variant],
    }
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if variant.startswith("stock"):
        both = Dataset.from_list(rows(options.length, seed=1) + rows(options.length, seed=2))
        collator = UnlearningCollator(pad_token_id=0)
        return Trainer(model, UnlearningConfig(**settings), train_dataset=both, data_collator=collator)
    # far below the model's own: the forget gradient of NPO is then that of ascent, and not 0
    known = {"ref_logps": -20.0 * options.length} if KNOWN.items() <= VARIANTS[variant].items() else {}
    return BLURTrainer(
        model, BLURConfig(**settings), rows(options.length, seed=1, **known), rows(options.length, seed=2)
    )


def measure(variant: str, config: LlamaConfig, options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if cuda else 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(variant, config, options, folder)
        steps = Steps.of(trainer, SimpleNamespace(device=options.device, clock="wall"))
        steps.micro_batches = 2 if variant == TWO else 1
        for _ in range(3):  # kernels are compiled, AdamW's moments made
            steps()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = [steps() for _ in range(options.rounds)]
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
        estimate = None
        if not variant.startswith("stock"):
            found = estimate_memory(config, trainer.args, dtype="bfloat16", device=options.device)
            estimate = found.total / 2**20
        if options.profile:
            options.profile.mkdir(parents=True, exist_ok=True)
            name = variant.replace(", ", "-").replace(" ", "_")
            (options.profile / f"{name}.txt").write_text(profiled(trainer, steps))
        loss = all(p.isfinite().all().item() for p in trainer.model.parameters())
    low, middle, high = statistics.quantiles([1e3 * value for value in seconds], n=4, method="inclusive")
    return {"ms": middle, "quartiles": [low, high], "peak_mib": peak, "estimate_mib": estimate, "finite": loss}


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


def line(variant: str, row: dict[str, Any], base: dict[str, Any] | None) -> str:
    if "error" in row:
        return f"{variant:34} {row['error'].splitlines()[0][:200]}"
    cells = f"{variant:34} {row['ms']:8.1f} {row['quartiles'][0]:8.1f}-{row['quartiles'][1]:.1f}"
    if base and "ms" in base:
        over = row["ms"] / base["ms"] / (1 if variant.startswith("stock") and variant != TWO else 2)
        cells += f"  x {over:5.2f}"
        if row["peak_mib"]:
            cells += f"  {row['peak_mib']:8.0f} MiB = {row['peak_mib'] / base['peak_mib']:.2f} of stock"
    if row["peak_mib"] and row["estimate_mib"]:
        cells += f", {row['peak_mib'] / row['estimate_mib']:.2f} of the estimate"
    return cells + ("" if row["finite"] else "  NOT FINITE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--batch-size", type=int, default=2, help="examples per role")
    parser.add_argument("--length", type=int, default=1024, help="tokens per example")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, short texts, two steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="a folder for a profile of each variant")
    options = parser.parse_args()
    config = LARGE["1B"]
    if options.tiny:
        config, options.length, options.rounds = llama(64, 2), 16, 2
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    print(f"{options.batch_size} x {options.length} tokens per role, bfloat16 weights and moments", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for variant in options.variants:
        try:
            results[variant] = measure(variant, config, options)
        except Exception as error:  # noqa: BLE001
            results[variant] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(line(variant, results[variant], results.get(STOCK)), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results))
    return 0 if all(row.get("finite") for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
