"""The sections of `run.py`, the most important first: what each asks, for how long at most, and by which command."""

from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
TESTS = [
    *("tests/objectives", "tests/models", "tests/gradients/test_backend.py", "tests/gradients/test_rules.py"),
    *("tests/trainers/test_step.py", "tests/trainers/test_single_buffer.py", "tests/trainers/test_peft.py"),
]
MEASURED = [
    *("float32, log-probs precomputed", "float32, fused head", "float32, KL", "float32, accumulation 2"),
    *(
        "bfloat16, reference copied",
        "autocast to bfloat16",
        "LoRA, bfloat16, checkpointing",
        "float32, forget gradient on the CPU",
    ),
    *("float32, one gradient buffer", "bfloat16, BLUR-RMU, chosen matrices"),
]
#: about a third of the cells: each engine and each feature at least once, what takes long left out
CELLS = {
    "plain": "plain:BLUR-NPO;plain:blur;plain:rmu, lora;plain:NPO, lora;plain:offload;plain:one buffer, NPO;"
    "plain:fused head;plain:mgda;plain:bf16;plain:fp16;finite:bfloat16 weights;plain:compiled",
    "ddp_fsdp2": "ddp:NPO, kept logps;ddp:accumulation;ddp:tied;ddp:offload;ddp:bf16;fsdp2:NPO, kept logps;fsdp2:lora;"
    "fsdp2:NPO, lora, bf16;ddp:one-sided, checkpointing;"
    "fsdp2:clipping;fsdp2:checkpointing;fsdp2:fp16;fsdp2:offload;fsdp2_lean:sum",
    "zero": "zero0:sum;zero1:sum;zero1:fp16;zero2:BLUR-NPO;zero2:rmu;zero3:BLUR-NPO;zero3:accumulation;zero3:bf16;"
    "zero2_offload:BLUR-NPO;zero2_offload_pinned:BLUR-NPO;zero2_offload_pinned:fp16;zero3_offload:offload;"
    "zero3_offload:lora;zero3_offload_all:BLUR-NPO;zero2_fp32_sums:bf16",
}


@dataclass(frozen=True)
class Section:
    """`{device}` and `{json}` are filled in; `tiny` is the command for a machine without a GPU."""

    what: str
    limit: float  # seconds
    command: list[str]
    tiny: list[str] | None = None
    #: the command under `--all-cells`
    whole: list[str] | None = None
    #: nothing else runs meanwhile: it is timed, or needs the card's memory
    alone: bool = True


def gpu(module: str, *arguments: str) -> list[str]:
    return [str(HERE / module), *arguments, "--device", "{device}", "--json", "{json}"]


def bench(name: str, *arguments: str) -> list[str]:
    return [str(ROOT / "benchmarks" / name), *arguments, "--device", "{device}", "--json", "{json}"]


def pytest(*arguments: str, processes: int) -> list[str]:
    return ["-m", "pytest", "-n", str(processes), "-p", "no:cacheprovider", "--tb=short", *arguments]


def cells(name: str, *groups: str, launcher: tuple[str, ...] = ()) -> Section:
    first = CELLS[name].split(";")[0]
    return Section(
        f"the update of {', '.join(groups)}, one process, against the literal one",
        120,
        [*launcher, *gpu("cells.py", "--cells", CELLS[name])],
        [*launcher, *gpu("cells.py", "--cells", first)],
        [*launcher, *gpu("cells.py", *groups)],
        alone=False,
    )


#: these run at the same time
TOGETHER = {
    "environment": Section("card, driver, versions", 60, gpu("checks.py", "environment"), alone=False),
    "tests": Section(
        *("tests/gpu", 140, pytest("-m", "gpu", "tests/gpu", processes=4)),
        pytest("tests/gradients/test_rules.py", processes=0),
        alone=False,
    ),
    "plain": cells("plain", "plain"),
    "ddp_fsdp2": cells("ddp_fsdp2", "ddp", "fsdp2", launcher=(*TORCHRUN,)),
    "zero": cells("zero", "zero", launcher=(*TORCHRUN,)),
    "memory": Section(
        *("peak memory against the estimate, small models, and 8B with LoRA", 140),
        bench("memory.py", "--jobs", "4", "--headlines", "BLUR-NPO with LoRA, 8B", "--cases", *MEASURED),
        bench("memory.py", "--headlines", "--cases", "LoRA, float32"),
        alone=False,
    ),
    "launches": Section(
        *("kernel launches and waits per step", 90, bench("launches.py")),
        bench("launches.py", "--tiny"),
        alone=False,
    ),
    "head": Section("fused head against logits", 90, gpu("checks.py", "head"), alone=False),
    "dots": Section("error of a float32 dot product", 60, gpu("checks.py", "dots"), alone=False),
    "race": Section(
        *("gradients of offloaded partitions, read too early?", 140, [*TORCHRUN, *gpu("offload.py")]),
        [*TORCHRUN, *gpu("offload.py", "--size", "2M")],
        alone=False,
    ),
}
ALONE = {
    "steps": Section("a step of .1, 1 and 3 B in bfloat16", 110, gpu("steps.py"), gpu("steps.py", "--tiny")),
    "memory_8B": Section(
        *("peak memory of 8B, all parameters, on one card", 60),
        bench("memory.py", "--headlines", "BLUR-NPO, all parameters, 8B", "--cases"),
    ),
    "bandwidth": Section(
        *("Gramian and combination alone, against a copy of the same bytes", 45),
        gpu("bandwidth.py"),
        gpu("bandwidth.py", "--tiny"),
    ),
    "uld_generate": Section(
        *("ULD: generating", 45),
        bench(
            *("uld_generate.py", "--hidden", "2048", "--layers", "16", "4", "--vocabulary", "32000"),
            *("--batch-sizes", "8", "1", "--lengths", "32", "64", "--rounds", "2"),
        ),
        bench("uld_generate.py", "--hidden", "64", "--layers", "4", "1", "--lengths", "32", "--rounds", "1"),
    ),
    "evaluation": Section(
        *("TOFU's evaluation: questions per second", 50),
        bench(
            *("eval_throughput.py", "--sizes", "350M", "--rounds", "2", "--questions", "12", "--batch-size", "32"),
            *("--new-tokens", "24"),
        ),
        bench(
            *("eval_throughput.py", "--sizes", "2M", "--rounds", "2", "--questions", "4", "--batch-size", "8"),
            *("--new-tokens", "4"),
        ),
    ),
    "rmu": Section(
        *("a step of RMU: time", 35),
        bench("rmu_step.py", "--size", "350M", "--batch-size", "4", "--length", "512", "--rounds", "5", "--no-memory"),
        bench("rmu_step.py", "--size", "2M", "--layer", "2", "--rounds", "2", "--length", "16", "--no-memory"),
    ),
    "uld_train": Section(
        *("ULD: training", 40),
        bench(
            *("uld_train.py", "--sizes", "350M", "--batch-size", "8", "--length", "256", "--rounds", "5"),
            "--no-memory",
        ),
        bench("uld_train.py", "--sizes", "2M", "--rounds", "2", "--length", "16", "--no-memory"),
    ),
    "fused_speed": Section(
        *("fused head: time, memory", 30),
        bench(
            *("fused_head.py", "--dtype", "bfloat16", "--hidden", "2048", "--layers", "2", "--rounds", "5"),
            *("--shapes", "8192,4,512", "128256,4,512", "128256,2,2048"),
        ),
        bench("fused_head.py", "--hidden", "64", "--layers", "1", "--rounds", "2", "--shapes", "1000,2,16"),
    ),
    "variants": Section(
        *("a step of 1 B, all variants", 80),
        gpu("steps.py", "--sizes", "1B", "--variants", "all"),
        gpu("steps.py", "--tiny", "--variants", "one buffer"),
    ),
    "more_tests": Section(
        *("a part of the tests, with a GPU in sight", 120, pytest(*TESTS, processes=6)),
        pytest("tests/gradients/test_rules.py", processes=0),
    ),
}
SECTIONS = TOGETHER | ALONE
