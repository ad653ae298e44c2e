"""Is the gradient that ZeRO's CPU offload gives read before DeepSpeed's copy from the GPU has come?

    python -m torch.distributed.run --standalone --nproc_per_node=1 benchmarks/gpu/offload.py

DeepSpeed fills the partitions on the CPU by copies that the host does not wait for. Here every slot that the backend
takes is compared with what stands in the partition once the device is done, with and without pinned memory. Said too:
where the slots are under ZeRO-3 offload, and the highest point of the GPU's memory.
"""

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from cells import run
from stepping import SIZES, build_model, rows
from support import parity
from transformers.utils import logging

from blur_trainer.gradients import deepspeed as zero

SLOTS: list[dict[str, Any]] = []


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def watched(read: Any) -> Any:
    def compare(self: Any) -> Any:
        early = list(read(self))
        kept = [None if g is None else g.clone() for g in early]
        synchronize()
        late = list(read(self))
        worst = max(float((a - b).abs().max()) for a, b in zip(kept, late, strict=True))
        scale = max(float(b.abs().max()) for b in late)
        gib = sum(g.numel() * g.element_size() for g in late) / 2**30
        SLOTS.append({"worst": worst, "scale": scale, "devices": sorted({str(g.device) for g in late}), "gib": gib})
        return early

    return compare


for kind in (zero.OffloadedPartitions, zero.Stage3, zero.Partitions):
    kind._read = watched(kind._read)  # type: ignore[method-assign]


def attempt(cell: str, folder: str, size: str) -> dict[str, Any]:
    engine, accumulation = cell.split(":")
    SLOTS.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    count = int(accumulation)
    settings = {"gradient_accumulation_steps": count, "per_device_train_batch_size": 8 // count, "max_steps": 2}
    parity.FORGET, parity.RETAIN = rows(64, seed=1), rows(64, seed=2)
    model = build_model(size).bfloat16()
    trainer = parity.make(engine, "sum", folder, model=model, learning_rate=1e-6, bf16=True, **settings)
    trainer.train()
    worst = max(slot["worst"] / (slot["scale"] or 1.0) for slot in SLOTS)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(f"   {cell}: slots on {SLOTS[0]['devices']}, {SLOTS[0]['gib']:.2f} GiB each, peak {peak:.2f} GiB", flush=True)
    return {"value": worst, "good": worst == 0.0, "slots": copy.deepcopy(SLOTS), "peak_gib": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="350M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 4))
    engines = ["zero2_offload_pinned", "zero2_offload", "zero3_offload"]  # 20 to 37 s each on an H100
    cells = [f"{engine}:{count}" for count in (2, 1) for engine in engines]
    return 0 if run(cells, options, lambda cell, folder: attempt(cell, folder, options.size)) else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
