"""Everything that is worth asking a GPU, in one run of about eight minutes; a section that fails stops no other.

    python benchmarks/gpu/run.py --out results                     # on one GPU
    python benchmarks/gpu/run.py --out results --only plain,zero   # some sections
    python benchmarks/gpu/run.py --list
    python benchmarks/gpu/run.py --out results --device cpu --tiny # does every section run at all? No GPU needed

Each section is a process of its own with its own limit, then ended with all that it started. First the environment;
then, all at once, what is not timed; then the rest, one after the other. Written: `results.json` (verdict, seconds and
what the section wrote as JSON, also if it was cut off), `log.txt` (all output).
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
TESTS = [
    *("tests/objectives", "tests/models", "tests/gradients/test_backend.py", "tests/gradients/test_rules.py"),
    *("tests/trainers/test_step.py", "tests/trainers/test_single_buffer.py", "tests/trainers/test_peft.py"),
]
MEASURED = [
    *("float32, reference copied", "float32, log-probs precomputed", "float32, long, checkpointing"),
    *("float32, fused head", "float32, KL", "bfloat16, reference copied", "autocast to bfloat16"),
    *("LoRA, bfloat16, checkpointing", "float32, forget gradient on the CPU", "float32, one gradient buffer"),
    *("float32, BLUR-RMU, chosen matrices", "bfloat16, BLUR-RMU, chosen matrices"),
]


@dataclass(frozen=True)
class Section:
    """`{device}` and `{json}` are filled in; `tiny` is the command for a machine without a GPU."""

    what: str
    limit: float  # seconds
    command: list[str]
    tiny: list[str] | None = None
    timed: bool = True


def gpu(module: str, *arguments: str) -> list[str]:
    return [str(HERE / module), *arguments, "--device", "{device}", "--json", "{json}"]


def bench(name: str, *arguments: str) -> list[str]:
    return [str(ROOT / "benchmarks" / name), *arguments, "--device", "{device}"]


UNTIMED = {
    "plain": Section("one process against the reference", 150, gpu("cells.py", "plain"), timed=False),
    "ddp_fsdp2": Section("DDP, FSDP2, one process", 150, [*TORCHRUN, *gpu("cells.py", "ddp", "fsdp2")], timed=False),
    "zero": Section("DeepSpeed ZeRO, one process", 150, [*TORCHRUN, *gpu("cells.py", "zero")], timed=False),
    "head": Section("fused head against logits", 150, gpu("checks.py", "head"), timed=False),
    "dots": Section("error of a float32 dot product", 150, gpu("checks.py", "dots"), timed=False),
    "race": Section(
        *("gradients of offloaded partitions, read too early?", 180, [*TORCHRUN, *gpu("offload.py")]),
        [*TORCHRUN, *gpu("offload.py", "--size", "2M")],
        timed=False,
    ),
    "memory": Section(
        *("measured / estimated memory", 150),
        bench("memory.py", "--jobs", "4", "--headlines", "BLUR-NPO with LoRA, 8B", "--cases", *MEASURED),
        bench("memory.py", "--headlines", "--cases", "LoRA, float32"),
        timed=False,
    ),
    "tests": Section(
        *("a part of the tests, with a GPU in sight", 150),
        ["-m", "pytest", "-n", "6", "-p", "no:cacheprovider", "--tb=short", *TESTS],
        ["-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "--tb=short", "tests/gradients/test_rules.py"],
        timed=False,
    ),
}
TIMED = {
    "steps": Section("a step of a 1B Llama in bfloat16: time, memory", 105, gpu("steps.py"), gpu("steps.py", "--tiny")),
    "fused_speed": Section(
        "fused head: time, memory",
        45,
        bench(
            *("fused_head.py", "--dtype", "bfloat16", "--hidden", "2048", "--layers", "2", "--rounds", "5"),
            *("--shapes", "8192,4,512", "32000,4,512", "32000,4,2048", "128256,4,512", "128256,2,2048"),
        ),
        bench("fused_head.py", "--hidden", "64", "--layers", "1", "--rounds", "2", "--shapes", "1000,2,16"),
    ),
    "rmu": Section(
        *("a step of RMU: time", 55),
        bench("rmu_step.py", "--size", "350M", "--batch-size", "4", "--length", "512", "--rounds", "5", "--no-memory"),
        bench("rmu_step.py", "--size", "2M", "--layer", "2", "--rounds", "2", "--length", "16", "--no-memory"),
    ),
    "uld_train": Section(
        *("ULD: training", 45),
        bench(
            *["uld_train.py", "--sizes", "350M", "--batch-size", "8", "--length", "256", "--rounds", "5", "--no-memory"]
        ),
        bench("uld_train.py", "--sizes", "2M", "--rounds", "2", "--length", "16"),
    ),
    "uld_generate": Section(
        *("ULD: generating", 45),
        bench(
            *("uld_generate.py", "--hidden", "2048", "--layers", "16", "4", "--vocabulary", "32000"),
            *("--lengths", "32", "64", "--rounds", "2"),
        ),
        bench("uld_generate.py", "--hidden", "64", "--layers", "4", "1", "--lengths", "32", "--rounds", "1"),
    ),
    "evaluation": Section(
        "TOFU's evaluation: questions per second",
        50,
        bench(
            *("eval_throughput.py", "--sizes", "350M", "--rounds", "2", "--questions", "16", "--batch-size", "32"),
            *("--new-tokens", "32", "--json", "{json}"),
        ),
        bench(
            *("eval_throughput.py", "--sizes", "2M", "--rounds", "2", "--questions", "4", "--batch-size", "8"),
            *("--new-tokens", "4", "--json", "{json}"),
        ),
    ),
}
SECTIONS = {
    "environment": Section("card, driver, versions", 60, gpu("checks.py", "environment"), timed=False),
    **UNTIMED,
    **TIMED,
}


def environment(device: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    more = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        **{"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_BUILD_OPS": "0"},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    if device == "cpu":
        more |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | more


RUNNING: set[int] = set()


def end(process: int) -> None:
    """With all that it started: torchrun gives its workers sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        section = psutil.Process(process)
        for one in [*section.children(recursive=True), section]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def stop(*_: Any) -> None:
    """Told to end: so does everything that was started. What results.json has so far stays."""
    for process in list(RUNNING):
        end(process)
    os._exit(124)


class Log:
    """What the sections print, on the screen and in the file, line by line with the section's name."""

    def __init__(self, path: Path):
        self.file, self.lock = path.open("w", encoding="utf-8"), threading.Lock()

    def __call__(self, name: str, line: str) -> None:
        with self.lock:
            for out in (sys.stdout, self.file):
                print(f"[{name}] {line.rstrip()}", file=out, flush=True)


def perform(name: str, options: argparse.Namespace, log: Log, folder: Path, results: dict[str, Any]) -> None:
    section, path = SECTIONS[name], folder / f"{name}.json"
    command = (section.tiny if options.tiny and section.tiny else section.command).copy()
    command = [part.format(device=options.device, json=path) if part.startswith("{") else part for part in command]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(options.device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    RUNNING.add(process.pid)
    cut = threading.Event()
    timer = threading.Timer(section.limit * options.patience, lambda: (cut.set(), end(process.pid)))
    timer.start()
    kept = []
    for line in process.stdout or ():
        log(name, line)
        kept.append(line.rstrip())
    process.wait()
    timer.cancel()
    RUNNING.discard(process.pid)
    verdict = "timeout" if cut.is_set() else "passed" if process.returncode == 0 else "failed"
    result = {"what": section.what, "verdict": verdict, "seconds": round(time.monotonic() - start, 1)}
    try:
        result["json"] = json.loads(path.read_text())
    except (OSError, ValueError):
        result["output"] = kept[-60:]
    results[name] = result
    log(name, f"== {verdict}, {result['seconds']} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.json and log.txt")
    parser.add_argument("--only", help="sections, by commas")
    parser.add_argument("--list", action="store_true", help="the sections and their limits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes; one section at a time")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits")
    options = parser.parse_args()
    if options.list or not options.out:
        for name, section in SECTIONS.items():
            print(f"{name:14} {section.limit:5.0f} s  {section.what}{'' if section.timed else ', not timed'}")
        return 0
    signal.signal(signal.SIGTERM, stop)
    names = [name for name in SECTIONS if not options.only or name in options.only.split(",")]
    if not names:
        parser.error("no such section")
    options.out.mkdir(parents=True, exist_ok=True)
    log, results, start = Log(options.out / "log.txt"), {}, time.monotonic()
    at_once = [name for name in names if name in UNTIMED and not options.tiny]
    rounds = [[name] for name in names if name not in at_once]
    rounds.insert(1 if names[0] == "environment" else 0, at_once)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(SECTIONS)) as pool:
        for together in rounds:
            list(pool.map(lambda name: perform(name, options, log, Path(folder), results), together))
            (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in names:
        result = results.get(name, {"verdict": "not run", "seconds": 0.0})
        log("run", f"{name:14} {result['verdict']:8} {result['seconds']:7.1f} s")
    log("run", f"{'all':14} {'':8} {time.monotonic() - start:7.1f} s")
    return 0 if all(result["verdict"] == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
