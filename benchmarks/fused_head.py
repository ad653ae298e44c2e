"""Log-probabilities with and without logits: forward and backward pass of one model on both ways, time and memory.

    python benchmarks/fused_head.py                                 # this CPU, one thread, CPU seconds
    python benchmarks/fused_head.py --device cuda --dtype bfloat16 --hidden 2048 --layers 4 --shapes 32000,4,1024

The results decide the default of `fused_lm_head` (`fused_heads.FUSED_FROM`). Time is the median of the rounds, both
ways in turn. Memory is the highest point of a pass, less what is held before it (CPU, Linux: resident memory, as in
step_cost.py).
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine, resident
from rows import row, write_rows
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from blur_trainer.models.forward import answer_logps, choose_head

# vocabulary, batch size, tokens
SHAPES = ((8192, 2, 64), (8192, 2, 512), (65536, 2, 256))
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def held(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def one_pass(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], device: str) -> tuple[float, int]:
    """Seconds and bytes."""
    model.zero_grad(set_to_none=True)
    before = held(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark, see proc(5)
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    answer_logps(model, batch).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    return seconds, (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before


def compare(shape: tuple[int, int, int], options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """A line of the table, and the rows behind it."""
    vocabulary, batch_size, tokens = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        intermediate_size=8 * options.hidden // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        tie_word_embeddings=False,
    )
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    ids = torch.randint(3, vocabulary, (batch_size, tokens), device=options.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    results: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    for round_ in range(options.rounds + 1):
        for fused in results:
            choose_head(model, fused, model.device)
            result = one_pass(model, batch, options.device)
            if round_ > 0:
                results[fused].append(result)
    logits, fused = (tuple(map(statistics.median, zip(*pairs, strict=True))) for pairs in results.values())
    cells = [f"{1e3 * seconds:.1f}, {peak / 2**20:.0f}" for seconds, peak in (logits, fused)]
    name = f"vocabulary {vocabulary}, {batch_size} x {tokens}"
    names = ("time", "memory")
    ratios = [row(f"{name}: {n}", f / u, "of logits'") for n, u, f in zip(names, logits, fused, strict=True)]
    return f"| {vocabulary}, {batch_size} × {tokens} | {' | '.join(cells)} |", ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=shape, metavar="VOCABULARY,BATCH,TOKENS")
    options = parser.parse_args()
    if options.device == "cpu" and not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # freed blocks go back at once
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(machine(options.device))
    print("| vocabulary, tokens | logits: ms, MiB | fused: ms, MiB |\n|---|---|---|")
    found: list[dict[str, Any]] = []
    for sizes in options.shapes:
        line, more = compare(sizes, options)
        print(line, flush=True)
        found += more
        write_rows(options.json, found)


if __name__ == "__main__":
    main()
