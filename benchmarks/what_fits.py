"""What fits where: the table of docs/scaling.md, by `estimate_memory`. Nothing is measured here. The last column says
what of a row no measurement on a GPU stands behind.

python benchmarks/what_fits.py
"""

from typing import Any

from memory_cases import CHECKPOINTS, KNOWN, LENGTH, SLOT_ON_CPU, Case
from shapes import SHAPES

from blur_trainer.memory.estimate import MemoryEstimate, estimate_memory

SIZES = ("1B", "8B", "70B")
CARDS = ((1, 24), (1, 40), (1, 80), (8, 80))
ROOM = 0.9  # of a card: the rest is for the CUDA context, fragmentation and the estimate's own error
#: processes, how it is trained, settings, arguments of `estimate_memory`
WAYS: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (1, "QLoRA, 4 bits", {}, {"bits": 4, "lora": True}),
    (1, "LoRA", {}, {"lora": True}),
    (1, "all, float32 weights, Adam", KNOWN | {"bf16": True}, {"dtype": "float32"}),
    (
        1,
        "all, float32 weights, Adam, forget gradient on the CPU",
        KNOWN | SLOT_ON_CPU | {"bf16": True},
        {"dtype": "float32"},
    ),
    (1, "all, bfloat16 weights, 8-bit Adam", KNOWN | {"optim": "adamw_8bit"}, {}),
    (
        1,
        "all, bfloat16 weights, paged 8-bit Adam, forget gradient on the CPU",
        KNOWN | SLOT_ON_CPU | {"optim": "paged_adamw_8bit"},
        {},
    ),
    (1, "all, bfloat16 weights, Adam, forget gradient on the CPU", KNOWN | SLOT_ON_CPU, {}),
    (1, "all, bfloat16 weights, Adam", KNOWN, {}),
    (8, "LoRA, FSDP2", {}, {"sharding": "fsdp", "lora": True}),
    (8, "all, Adam, ZeRO-2", KNOWN, {"sharding": "zero2"}),
    (8, "all, Adam, ZeRO-3", KNOWN, {"sharding": "zero3"}),
    (8, "all, Adam, ZeRO-3, offloaded", KNOWN, {"sharding": "zero3_offload"}),
    (8, "all, Adam, FSDP2, float32 shards", KNOWN | {"bf16": True}, {"sharding": "fsdp", "dtype": "float32"}),
]


def needed(size: str, processes: int, settings: dict[str, Any], options: dict[str, Any]) -> MemoryEstimate:
    """Per GPU."""
    case = Case(
        SHAPES[size],
        settings | CHECKPOINTS | {"fused_lm_head": True},
        lora="lora" in options,
        batch_size=1,
        length=LENGTH,
    )
    keywords: dict[str, Any] = {"dtype": "bfloat16"} | {key: v for key, v in options.items() if key != "lora"}
    arguments = case.arguments("cpu")
    return estimate_memory(case.config, arguments, processes, peft_config=case.peft_config(), device="cuda", **keywords)


def table() -> str:
    """Per way and model: GiB per GPU, and the smallest cards that have them."""
    lines = [
        f"| GPUs | trained | {' | '.join(SIZES)} | not checked on a GPU |",
        f"|---|---|{'---|' * (len(SIZES) + 1)}",
    ]
    for processes, name, settings, options in WAYS:
        cells = []
        for size in SIZES:
            estimate = needed(size, processes, settings, options)
            gib = estimate.total / 2**30
            fitting = [f"{n} x {card}" for n, card in CARDS if n == processes and gib <= ROOM * card]
            cells.append(f"{gib:.1f}: {fitting[0] if fitting else 'none'}")
        cells.append(", ".join(estimate.unchecked) or "(checked)")
        lines.append(f"| {processes} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
