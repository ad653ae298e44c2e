"""What a BLUR step costs, in time and memory, against plain fine-tuning steps on the same model and batches.

    python benchmarks/step_cost.py                      # CPU: three sizes, about three minutes on two cores
    python benchmarks/step_cost.py --device cuda --sizes 350M 1B --batch-size 4 --length 512 --json costs.json

Time. Every variant is a real trainer; its optimizer step is driven as `Trainer`'s own loop does (get_batch_samples,
training_step, clipping, AdamW, scheduler, zero_grad). Per round each variant takes one step, in rotating order, so that
drift and load hit all of them; a ratio is the median over rounds of the ratio within a round. On a machine that does
other work too, `--clock cpu --threads 1` counts this process's CPU seconds instead of the time on the wall.

Memory. Each variant runs alone in a fresh process. What a step needs is the peak during it, less what is held between
steps (weights, AdamW's moments, the interpreter). CPU (Linux): resident memory and the kernel's high-water mark of it,
reset after two warm-up steps, malloc set to return freed blocks at once. CUDA: torch's counters of allocated memory.
The unit is one copy of the gradients.
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

from measuring import begin, held, in_turns, machine, memory_in_subprocess, peak, ratio, step_options
from stepping import BLUR_GA, BLUR_NPO, GRAD_DIFF, ONE_BUFFER, PASSES, SIZES, STOCK, VARIANTS, Steps, build_model

MEMORY_VARIANTS = (STOCK, PASSES, GRAD_DIFF, BLUR_GA, ONE_BUFFER, BLUR_NPO)


def time_size(size: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per variant, one entry per round."""
    with tempfile.TemporaryDirectory() as folder:
        return in_turns({variant: Steps(variant, size, options, folder) for variant in VARIANTS}, options.rounds)


# ---- memory ----


def step_bytes(variant: str, size: str, options: argparse.Namespace) -> int:
    """Peak during a step, less what is held between steps."""
    with tempfile.TemporaryDirectory() as folder:
        step = Steps(variant, size, options, folder)
        step(), step()
        between = held(options.device)
        return peak(step, options.device) - between


# ---- report ----


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    parameters = sum(p.numel() for p in build_model(size, "meta").parameters())
    seconds = time_size(size, options)
    peaks = {variant: memory_in_subprocess(__file__, variant, options, sizes=size) for variant in MEMORY_VARIANTS}
    result: dict[str, Any] = {"size": size, "parameters": parameters, "gradient_bytes": 4 * parameters, "variants": {}}
    for variant in VARIANTS:
        median, low, high = ratio(seconds, variant, STOCK)
        peak, base = peaks.get(variant), peaks[STOCK]
        result["variants"][variant] = {
            "median_ms": 1e3 * statistics.median(seconds[variant]),
            "over_stock": median,
            "quartiles": [low, high],
            "step_mib": None if peak is None else peak / 2**20,
            "extra_gradient_copies": None if peak is None or base is None else (peak - base) / (4 * parameters),
        }
    result["npo_over_ascent"] = ratio(seconds, BLUR_NPO, BLUR_GA)
    return result


def table(result: dict[str, Any]) -> str:
    gradient = result["gradient_bytes"] / 2**20
    lines = [
        f"\n{result['size']}: {result['parameters'] / 1e6:.1f} M parameters, one gradient copy = {gradient:.0f} MiB",
        f"{'':34} {'ms':>8} {'x stock':>8} {'quartiles':>13} {'step MiB':>9} {'extra copies':>13}",
    ]
    for name, row in result["variants"].items():
        low, high = row["quartiles"]
        memory = f"{'-':>9} {'-':>13}"
        if row["step_mib"] is not None:
            memory = f"{row['step_mib']:9.0f} {row['extra_gradient_copies']:13.2f}"
        lines.append(f"{name:34} {row['median_ms']:8.1f} {row['over_stock']:8.3f} {low:6.3f}-{high:.3f} {memory}")
    return "\n".join(lines)


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    def line(what: str, values: list[float | None], limit: float, tolerance: float = 0.0) -> str:
        if any(value is None for value in values):
            return f"not measured  {what}"
        shown = ", ".join(f"{r['size']} {value:.3f}" for r, value in zip(results, values, strict=True))
        met = all(value <= limit + tolerance for value in values if value is not None)
        return f"{'met' if met else 'MISSED':13} {what} <= {limit}: {shown}"

    def column(variant: str, key: str) -> list[float | None]:
        return [r["variants"][variant][key] for r in results]

    # stock accumulation, too, has a whole gradient beside the activations of its second pass
    pairs = zip(*(column(variant, "extra_gradient_copies") for variant in (ONE_BUFFER, PASSES)), strict=True)
    over_accumulation = [None if one is None or stock is None else one - stock for one, stock in pairs]
    noise = 0.02  # resident memory comes in pages, and the interpreter allocates too
    return [
        line("time, BLUR / two stock steps", column(BLUR_GA, "over_stock"), 1.05),
        line("time, BLUR-NPO precomputed / two stock steps", column(BLUR_NPO, "over_stock"), 1.05),
        line("time, NPO precomputed / gradient ascent", [r["npo_over_ascent"][0] for r in results], 1.05),
        line("memory, BLUR over stock in gradient copies", column(BLUR_GA, "extra_gradient_copies"), 1.0, noise),
        line("time, one buffer / two stock steps", column(ONE_BUFFER, "over_stock"), 1.8),
        line("memory, one buffer over stock accumulation, copies", over_accumulation, 0.0, noise),
        line("memory, BLUR-NPO precomputed over stock, copies", column(BLUR_NPO, "extra_gradient_copies"), 1.0, noise),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = step_options(__doc__, MEMORY_VARIANTS, rounds=15, batch_size=2, length=64)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: 2M 15M 60M (CUDA: 60M 350M 1B)")
    options = begin(parser)
    options.sizes = options.sizes or (["60M", "350M", "1B"] if options.device == "cuda" else ["2M", "15M", "60M"])
    return options


def main() -> None:
    options = parse_arguments()
    if options.memory_of:
        print(step_bytes(options.memory_of, options.sizes[0], options))
        return
    before = machine(options.device)
    work = f"{options.batch_size} x {options.length} tokens per role, float32"
    print(f"{before}\n{options.rounds} rounds, {work}, {options.clock} clock")
    results = []
    for size in options.sizes:
        results.append(measure(size, options))
        print(table(results[-1]), flush=True)
    print("\n" + "\n".join(verdicts(results)))
    print(f"At the end: {machine(options.device)}")
    if options.json:
        report = {"machine": before, "settings": vars(options), "sizes": results, "verdicts": verdicts(results)}
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
