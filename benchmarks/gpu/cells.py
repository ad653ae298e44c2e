"""Trainings on the device against the literal training of tests/support/reference.py, which stays on the CPU.

    python benchmarks/gpu/cells.py plain
    python -m torch.distributed.run --standalone --nproc_per_node=1 benchmarks/gpu/cells.py ddp fsdp2 zero

A cell is `||w - w_ref|| / ||w_ref - w_start||` after three AdamW steps, as in benchmarks/parity.py, with the tolerance
of a device that sums in another order. Half precision on the whole is only asked to stay finite and to move.
tests/gpu runs a part of these cells by this program.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from support import parity
from transformers.utils import logging

from blur_trainer import BLUR
from blur_trainer.objectives.preference import NPO

DEFAULT = 1e-4
# "rmu, inductor": in the first step the model is its frozen copy, and rounding is the whole retain gradient, times 800
TOLERANCE = {"mgda": 5e-4, "rmu, inductor": 5e-4, "bf16": 0.15, "NPO, lora, bf16": 0.15, "fp16": 0.05}
SMALL_SCALE = 2.0**10  # of the loss: 2^16, where GradScaler begins, skips the first steps
parity.FEATURES |= {
    "BLUR-NPO": {"npo": True, "precompute_ref_logps": True},
    "BLUR-NPO, live": {"npo": True},
    "rmu, lora": {"rule": "blur_wmdp", "rmu": True, "lora": True, "fresh": True, "accumulation": 2},
    "offload": {"rule": "sum", "accumulation": 2, "offload_forget_gradient": True},
    "one buffer, NPO": {"accumulation": 2, "npo": True, "single_gradient_buffer": True},
    # transformers switches TF32 on for compiled models, unless told not to
    "compiled": parity.FEATURES["compiled"] | {"tf32": False},
    "inductor": {
        "rule": "sum",
        "accumulation": 2,
        "torch_compile": True,
        "torch_compile_backend": "inductor",
        "tf32": False,
    },
    "BLUR-NPO, inductor": {
        **{"npo": True, "precompute_ref_logps": True},
        **{"torch_compile": True, "torch_compile_backend": "inductor", "tf32": False},
    },
    "rmu, inductor": {
        **{"rule": "blur_wmdp", "rmu": True, "train_layers": "0,1", "train_parameters": "down_proj|o_proj"},
        **{"torch_compile": True, "torch_compile_backend": "inductor", "tf32": False},
    },
}
parity.ENGINES["zero2_offload_pinned"] = parity.zero(2, "optimizer")
parity.ENGINES["zero2_offload_pinned"]["deepspeed"]["zero_optimization"]["offload_optimizer"]["pin_memory"] = True
parity.ENGINES["plain"] = {}

PLAIN = [
    *("BLUR-NPO", "BLUR-NPO, live", "blur", "sum", "rmu", "rmu, lora", "lora", "NPO, lora", "offload", "one buffer"),
    *("one buffer, sum", "one buffer, NPO", "fused head", "tied", "clipping", "checkpointing", "frozen", "pcgrad"),
    *("mgda", "bf16", "fp16"),
]
COMPILED = ["compiled", "inductor", "BLUR-NPO, inductor", "rmu, inductor"]
ENGINE = ["sum", "blur", "NPO, kept logps", "lora", "accumulation", "clipping", "tied", "checkpointing", "fused head"]
HALF = ["bf16", "fp16"]
STAGES = ["zero1", "zero2", "zero3", "zero2_offload", "zero2_offload_pinned", "zero3_offload", "zero3_offload_all"]
GROUPS = {
    "plain": [*(f"plain:{f}" for f in PLAIN), "finite:bfloat16 weights", "finite:fp16, large scale"]
    + [f"plain:{feature}" for feature in COMPILED],
    "ddp": [f"ddp:{f}" for f in [*ENGINE, "rmu", "offload", "one buffer", *HALF]],
    "fsdp2": [f"fsdp2:{f}" for f in [*ENGINE, "rmu", "offload", *HALF]] + ["fsdp2_lean:sum"],
    "zero": [f"{stage}:{f}" for f in ["sum", "BLUR-NPO", *HALF, "lora", "accumulation", "offload"] for stage in STAGES]
    + [f"{stage}:rmu" for stage in ("zero2", "zero3")]
    + ["zero0:sum", "zero1_fp32_sums:bf16", "zero2_fp32_sums:bf16"],
}


def finite(feature: str, folder: str) -> float:
    """Loss of the last step; raises if a weight is not finite or none has moved."""
    if feature == "bfloat16 weights":
        model = parity.build({}).bfloat16()
        more: dict[str, Any] = {"model": model, "rule": BLUR(), "forget_objective": NPO(), "learning_rate": 1e-2}
    else:
        more = {"fp16": True, "max_steps": 12, "num_train_epochs": 4}
    trainer = parity.make("plain", "blur", folder, **more)
    start = {name: p.detach().float().cpu().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    end = {name: p.detach().float().cpu() for name, p in trainer.model.named_parameters()}
    if not all(value.isfinite().all() for value in end.values()):
        raise AssertionError("weights are not finite")
    if all(torch.equal(start[name], end[name]) for name in start):
        raise AssertionError("nothing moved")
    return trainer.state.log_history[-1]["train_loss"]


def one(cell: str, folder: str) -> dict[str, Any]:
    engine, feature = cell.split(":")
    if engine == "finite":
        value = finite(feature, folder)
        return {"value": value, "good": math.isfinite(value)}
    trainer = parity.make(engine, feature, folder)
    scaler = trainer.accelerator.scaler
    if scaler is not None and feature == "fp16":
        scaler._init_scale = SMALL_SCALE
    trainer.train()
    value, tolerance = parity.error(engine, feature, trainer), TOLERANCE.get(feature, DEFAULT)
    return {"value": value, "tolerance": tolerance, "good": value <= tolerance, "device": str(trainer.args.device)}


def run(cells: list[str], options: argparse.Namespace, attempt: Callable[[str, str], dict[str, Any]] = one) -> bool:
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            start = time.perf_counter()
            try:
                results[cell] = attempt(cell, folder)
            except Exception as error:  # noqa: BLE001
                results[cell] = {"good": False, "error": f"{type(error).__name__}: {error}"[:2000]}
                traceback.print_exc()
            row = results[cell]
            row["seconds"] = round(time.perf_counter() - start, 2)
            value = f"{row['value']:.1e}" if "value" in row else row["error"].splitlines()[0][:200]
            print(f"{'ok ' if row['good'] else 'OFF'} {cell:40} {value}  ({row['seconds']} s)", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results))
    off = [cell for cell, row in results.items() if not row["good"]]
    print(f"{len(results) - len(off)} of {len(results)} cells are good" + (f"; not: {'; '.join(off)}" if off else ""))
    return not off


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], metavar="group", help=", ".join(GROUPS))
    parser.add_argument("--cells", help="instead of whole groups, by semicolons: 'plain:blur;finite:bfloat16 weights'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible")
    if bool(options.groups) == bool(options.cells):
        parser.error("give groups, or --cells")
    cells = options.cells.split(";") if options.cells else [c for group in options.groups for c in GROUPS[group]]
    return 0 if run(cells, options) else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)  # gloo aborts an exit now and then, after everything is written
