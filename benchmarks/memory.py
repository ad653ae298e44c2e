"""Memory of real trainings against `blur_trainer.estimate_memory`, and the table of docs/scaling.md.

    python benchmarks/memory.py                    # measured on this CPU / estimated, exit code 1 if one is off
    python benchmarks/memory.py --device cuda      # on a GPU, and what 8B-shaped Llamas need
    python benchmarks/memory.py --table            # estimates only: what fits where

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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import machine, resident
from peft import LoraConfig
from stepping import VOCAB, rows
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback
from transformers.utils import logging

from blur_trainer.memory.estimate import MemoryEstimate, estimate_memory
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer

LOW, HIGH = 0.9, 1.15
LENGTH = 2048  # of the large models
SLOT_ON_CPU, ONE_BUFFER = {"offload_forget_gradient": True}, {"single_gradient_buffer": True}
CHECKPOINTS = {"activation_checkpointing": True}


def llama(width: int, layers: int, **kwargs: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(shape | kwargs))


# Shapes of Llama 3.2 1B, 3.1 8B and 3.1 70B
LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
LARGE = {
    "1B": llama(2048, 16, **LLAMA_3, intermediate_size=8192, num_attention_heads=32, tie_word_embeddings=True),
    "8B": llama(4096, 32, **LLAMA_3, intermediate_size=14336, num_attention_heads=32),
    "70B": llama(8192, 80, **LLAMA_3, intermediate_size=28672, num_attention_heads=64),
}


@dataclass(frozen=True)
class Case:
    """One training: a model, how it is stored and trained, and the settings."""

    config: LlamaConfig
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    lora: bool = False
    batch_size: int = 2
    length: int = 256
    limit: float | None = None  # GB on one card

    def peft_config(self) -> LoraConfig | None:
        return LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0) if self.lora else None

    def arguments(self, device: str, folder: str = "unused") -> BLURConfig:
        return BLURConfig(
            output_dir=folder,
            max_length=self.length,
            per_device_train_batch_size=self.batch_size,
            max_steps=3,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **self.settings,
        )

    def estimate(self, device: str) -> MemoryEstimate:
        # `use_cpu`: settings such as bf16 are checked against the machine, which need not be the one estimated for
        arguments = self.arguments("cpu")
        return estimate_memory(self.config, arguments, peft_config=self.peft_config(), dtype=self.dtype, device=device)


KNOWN, COPY = {"precompute_ref_logps": True}, {}
RMU: dict[str, Any] = {
    "forget_objective": "rmu",
    "forget_objective_kwargs": {"layer": 5},
    "retain_objective": "activation_match",
    "retain_objective_kwargs": {"layer": 5},
}
CHOSEN = {"train_layers": "3,4,5", "train_parameters": "mlp.down_proj"}
CASES = {
    "float32, reference copied": Case(llama(512, 6)),
    "float32, log-probs precomputed": Case(llama(512, 6), KNOWN),
    "float32, long, precomputed": Case(llama(384, 6), KNOWN, length=768),
    "float32, long, checkpointing": Case(llama(384, 6), KNOWN | CHECKPOINTS, length=768),
    "float32, fused head": Case(llama(384, 4), KNOWN | {"fused_lm_head": True}, length=512),
    "float32, KL": Case(llama(384, 4), {"retain_objective": "kl"}, length=512),
    "float32, accumulation 2": Case(llama(512, 4), KNOWN | {"gradient_accumulation_steps": 2}),
    "float32, Adafactor": Case(llama(512, 6), KNOWN | {"optim": "adafactor"}, length=64),
    "float32, 8-bit Adam": Case(llama(512, 6), KNOWN | {"optim": "adamw_8bit"}),
    "bfloat16, reference copied": Case(llama(768, 6), dtype="bfloat16"),
    "autocast to bfloat16": Case(llama(512, 6), KNOWN | {"bf16": True}, length=512),
    "LoRA, float32": Case(llama(768, 6), lora=True),
    "LoRA, bfloat16, checkpointing": Case(llama(1024, 6), CHECKPOINTS, dtype="bfloat16", lora=True, length=512),
    "float32, forget gradient on the CPU": Case(llama(512, 6), KNOWN | SLOT_ON_CPU),
    "float32, one gradient buffer": Case(llama(512, 6), KNOWN | ONE_BUFFER | {"optim": "sgd"}),
    "float32, NPO, two layers trained": Case(llama(512, 6), {"train_layers": "3,4"}, length=512),
    "float32, BLUR-RMU, chosen matrices": Case(llama(768, 8), RMU | CHOSEN, length=512),
    "bfloat16, BLUR-RMU, chosen matrices": Case(llama(1024, 8), RMU | CHOSEN, dtype="bfloat16", length=512),
    "float32, BLUR-RMU, one matrix": Case(
        llama(768, 8), RMU | {"train_layers": "5", "train_parameters": "mlp.down_proj"}, length=1024
    ),
    "float32, BLUR-RMU, checkpointing": Case(llama(768, 8), RMU | CHOSEN | CHECKPOINTS, length=768),
    "float32, RMU, all parameters below": Case(llama(512, 8), RMU | {"rule": "sum"}, length=256),
    "float32, RMU with NLL": Case(llama(512, 6), RMU | {"retain_objective": "nll", "retain_objective_kwargs": None}),
    "float32, RMU with NLL, chosen matrices": Case(
        llama(512, 6), RMU | CHOSEN | {"retain_objective": "nll", "retain_objective_kwargs": None}, length=512
    ),
    "autocast to bfloat16, BLUR-RMU": Case(llama(768, 8), RMU | CHOSEN | {"bf16": True}, length=512),
    "LoRA, float32, BLUR-RMU": Case(llama(768, 8), RMU | {"train_layers": "3,4,5"}, lora=True, length=512),
}
HEADLINES = {
    "BLUR-NPO with LoRA, 8B": Case(
        LARGE["8B"], CHECKPOINTS, dtype="bfloat16", lora=True, batch_size=1, length=LENGTH, limit=40
    ),
    "BLUR-NPO, all parameters, 8B, 8-bit Adam": Case(
        LARGE["8B"], KNOWN | CHECKPOINTS | {"optim": "adamw_8bit"}, "bfloat16", batch_size=1, length=LENGTH, limit=96
    ),
}


def supported(case: Case, device: str) -> bool:
    """Settings of this version; the forget gradient on the CPU saves nothing where all is on the CPU."""
    if device == "cpu" and SLOT_ON_CPU.items() <= case.settings.items():
        return False
    return set(case.settings) <= {f.name for f in fields(BLURConfig)}


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
        data = [rows(case.length, seed=seed) for seed in (1, 2)]
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


def compare(names: list[str], device: str, jobs: int = 1) -> bool:
    """Prints one line per case; whether all ratios are as they should be."""
    print(f"{machine(device)}\n{'':42} {'measured':>9} {'estimated':>9} {'ratio':>6}   MiB")
    good = True
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(measure_in_subprocess, name, device) for name in names]
        for name, future in zip(names, running, strict=True):
            estimated = CASES[name].estimate(device).total
            if future.exception():
                print(f"{name:42} failed: {future.exception()}", flush=True)
                good = False
                continue
            measured = future.result()
            off = not LOW <= measured / estimated <= HIGH
            good &= not off
            numbers = f"{measured / 2**20:9.0f} {estimated / 2**20:9.0f} {measured / estimated:6.2f}"
            print(f"{name:42} {numbers}{'   OFF' if off else ''}", flush=True)
    return good


def headlines(device: str, names: list[str]) -> bool:
    """The two targets: measured on a GPU, else estimated and said so."""
    good = True
    for name in names:
        case = HEADLINES[name]
        estimated = case.estimate("cuda").total
        measured = measure_in_subprocess(name, device) if device == "cuda" else None
        met = (measured or estimated) / 1e9 <= case.limit
        within = measured is None or LOW <= measured / estimated <= HIGH
        good &= met and within
        shown = f"estimated {estimated / 1e9:.1f} GB, " + (
            f"measured {measured / 1e9:.1f} GB" if measured else "not measured"
        )
        print(f"{'met' if met else 'MISSED':6} {name} <= {case.limit} GB: {shown}{'' if within else '   OFF'}")
    return good


# ---- what fits where ----

CARDS = ((1, 24), (1, 40), (1, 80), (8, 80))
ROOM = 0.9  # of a card: the rest is for the CUDA context, fragmentation and the estimate's own error
#: processes, how it is trained, settings, arguments of `estimate_memory`
WAYS: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (1, "QLoRA, 4 bits", {}, {"bits": 4, "lora": True}),
    (1, "LoRA", {}, {"lora": True}),
    (1, "all, 8-bit Adam", KNOWN | {"optim": "adamw_8bit"}, {}),
    (1, "all, paged 8-bit Adam, forget gradient on the CPU", KNOWN | SLOT_ON_CPU | {"optim": "paged_adamw_8bit"}, {}),
    (1, "all, Adam", KNOWN, {}),
    (8, "LoRA, FSDP2", {}, {"sharding": "fsdp", "lora": True}),
    (8, "all, Adam, ZeRO-2", KNOWN, {"sharding": "zero2"}),
    (8, "all, Adam, ZeRO-3", KNOWN, {"sharding": "zero3"}),
    (8, "all, Adam, ZeRO-3, offloaded", KNOWN, {"sharding": "zero3_offload"}),
    (8, "all, Adam, FSDP2, float32 shards", KNOWN | {"bf16": True}, {"sharding": "fsdp", "dtype": "float32"}),
]


def needed(size: str, processes: int, settings: dict[str, Any], options: dict[str, Any]) -> float:
    """GiB per GPU."""
    case = Case(LARGE[size], settings | CHECKPOINTS, lora="lora" in options, batch_size=1, length=LENGTH)
    keywords: dict[str, Any] = {"dtype": "bfloat16"} | {key: v for key, v in options.items() if key != "lora"}
    arguments = case.arguments("cpu")
    estimate = estimate_memory(
        case.config, arguments, processes, peft_config=case.peft_config(), device="cuda", **keywords
    )
    return estimate.total / 2**30


def table() -> str:
    """Per way and model: GiB per GPU, and the smallest cards that have them."""
    lines = [f"| GPUs | trained | {' | '.join(LARGE)} |", f"|---|---|{'---|' * len(LARGE)}"]
    for processes, name, settings, options in WAYS:
        cells = []
        for size in LARGE:
            gib = needed(size, processes, settings, options)
            fitting = [f"{n} x {card}" for n, card in CARDS if n == processes and gib <= ROOM * card]
            cells.append(f"{gib:.1f}: {fitting[0] if fitting else 'none'}")
        lines.append(f"| {processes} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="NAME", help="default: all")
    parser.add_argument("--headlines", nargs="*", choices=list(HEADLINES), default=list(HEADLINES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time: on a GPU its counters are per process")
    parser.add_argument("--table", action="store_true", help="estimates for 1B, 8B and 70B, as in docs/scaling.md")
    parser.add_argument("--measure", choices=[*CASES, *HEADLINES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.table:
        print(table())
        return 0
    if options.measure:
        torch.set_num_threads(1)
        print(measure((CASES | HEADLINES)[options.measure], options.device))
        return 0
    names = [name for name in options.cases or CASES if supported(CASES[name], options.device)]
    good = compare(names, options.device, options.jobs)
    return 0 if headlines(options.device, options.headlines) and good else 1


if __name__ == "__main__":
    sys.exit(main())
