"""What training ULD's assistant costs, in time and memory, against NPO + NLL on all parameters of the same model.

    python benchmarks/uld_train.py                     # CPU: about two minutes on two cores
    python benchmarks/uld_train.py --device cuda --sizes 350M 1B --batch-size 8 --length 256

An epoch here is every forget example once, with a retain example each, in both trainings. ULD has three times as many
of them when it trains on two paraphrases per example, as it should: the second line of ratios.

Time: real trainers, driven step by step as `Trainer`'s loop does, in turns; the median over rounds of the ratio within
a round. Memory: the peak of three steps in a process of its own, less what that process held before the model was made;
weights, frozen reference and moments included. ULD loads the target by name, that is, its lower layers only.
"""

import argparse
import statistics
import tempfile
from typing import Any

from measuring import begin, held, in_turns, machine, memory_in_subprocess, peak, ratio, step_options
from rows import row, write_rows
from stepping import NPO_NLL, ROWS, SIZES, ULD, Steps, build_model

VARIANTS = (NPO_NLL, ULD)


def epochs(size: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per epoch and variant, one entry per round."""
    steps = -(-ROWS // options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        seconds = in_turns({variant: Steps(variant, size, options, folder) for variant in VARIANTS}, options.rounds)
    return {variant: [steps * elapsed for elapsed in each] for variant, each in seconds.items()}


def peak_bytes(variant: str, size: str, options: argparse.Namespace) -> int:
    """In this process: weights, moments and activations of a training."""
    before = held(options.device)
    with tempfile.TemporaryDirectory() as folder:
        return peak(Steps(variant, size, options, folder), options.device) - before


def memory(variant: str, size: str, options: argparse.Namespace) -> float | None:
    """MiB, measured in a process of its own."""
    found = memory_in_subprocess(__file__, variant, options, sizes=size)
    return None if found is None else found / 2**20


def report(size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    seconds = epochs(size, options)
    peaks = {variant: memory(variant, size, options) for variant in VARIANTS}
    parameters = sum(p.numel() for p in build_model(size, "meta").parameters())
    print(f"\n{size}: {parameters / 1e6:.1f} M parameters\n{'':32} {'s / epoch':>10} {'peak MiB':>9}")
    for variant in VARIANTS:
        peak = "-" if peaks[variant] is None else f"{peaks[variant]:.0f}"
        print(f"{variant:32} {statistics.median(seconds[variant]):10.2f} {peak:>9}")
    median, low, high = ratio(seconds, NPO_NLL, ULD)
    verdict = "met" if median >= 3 else "MISSED"
    print(f"{verdict:7} NPO + NLL / ULD, same examples, >= 3: {median:.2f} ({low:.2f}-{high:.2f})")
    print(f"        NPO + NLL / ULD with two paraphrases per example: {median / 3:.2f}")
    found = [row(f"{size}: time, NPO + NLL / ULD, same examples", median, least=3, spread=(low, high))]
    if None not in peaks.values():
        print(f"        memory, NPO + NLL / ULD: {peaks[NPO_NLL] / peaks[ULD]:.2f}", flush=True)
        found.append(row(f"{size}: memory, NPO + NLL / ULD", peaks[NPO_NLL] / peaks[ULD]))
    return found


def main() -> None:
    parser = step_options(__doc__, VARIANTS, rounds=9, batch_size=4, length=64)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["15M", "60M"])
    options = begin(parser)
    if options.memory_of:
        print(peak_bytes(options.memory_of, options.sizes[0], options))
        return
    print(
        f"{machine(options.device)}\n{options.rounds} rounds, {options.batch_size} x {options.length} tokens per role"
    )
    found: list[dict[str, Any]] = []
    for size in options.sizes:
        found += report(size, options)
        write_rows(options.json, found)
    print(f"\nAt the end: {machine(options.device)}")


if __name__ == "__main__":
    main()
