"""The Gramian and the combination of two gradients alone, against a copy of the same bytes on the same device.

    export PYTHONPATH=.:tests:benchmarks
    python benchmarks/gpu/bandwidth.py
    python benchmarks/gpu/bandwidth.py --sizes 1B --dtypes bfloat16

The tensors have the shapes of a model's parameters. The Gramian must read both gradients once; the combination must
read both and write one. The time that a copy takes per byte, divided by the time that they take per byte, is their
share of the bandwidth. Other ways to compute the Gramian are candidates: each with its time and its error, so that the
first card decides. The error is that of `<f, r>`, over the product of both norms, against float64.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from rows import row, write_rows
from shapes import SHAPES, llama
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from blur_trainer.gradients.backend import inner_products
from blur_trainer.gradients.sums import add_scaled

ROW = 2**12  # elements of one product in a batch of them: a float32 sum over so many is exact enough
Products = Callable[[list[Tensor], list[Tensor]], Tensor]


def shapes(config: LlamaConfig) -> list[torch.Size]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [parameter.shape for parameter in model.parameters()]


def _sums(products: list[list[Tensor]]) -> Tensor:
    """`(3,)` on the CPU, in one transfer."""
    flat = torch.cat([part.reshape(-1) for parts in products for part in parts]).cpu().double()
    return torch.stack([part.sum() for part in flat.split([sum(p.numel() for p in parts) for parts in products])])


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return [norm.square() for norm in torch._foreach_norm(tensors, 2, dtype=torch.float32)]


def batched(forget: list[Tensor], retain: list[Tensor]) -> Tensor:
    """`<f, r>` by batched products of bfloat16 with float32 sums; the norms of all tensors together."""
    mixed = []
    for f, r in zip(forget, retain, strict=True):
        f, r = f.flatten(), r.flatten()
        whole = len(f) // ROW * ROW
        a, b = f[:whole].view(-1, 1, ROW), r[:whole].view(-1, ROW, 1)
        if whole and f.dtype == torch.float32:
            mixed.append(torch.bmm(a, b))
        elif whole:
            mixed.append(torch.bmm(a, b, out_dtype=torch.float32))
        if whole < len(f):
            mixed.append(torch.dot(f[whole:].float(), r[whole:].float()))
    return _sums([_norms(forget), mixed, _norms(retain)])


def rounded(forget: list[Tensor], retain: list[Tensor]) -> Tensor:
    """`<f, r>` from elementwise products in the gradients' own type, summed in float32."""
    mixed = [torch.sum(f * r, dtype=torch.float32) for f, r in zip(forget, retain, strict=True)]
    return _sums([_norms(forget), mixed, _norms(retain)])


#: `inner_products` as it is, and what could replace it
WAYS: dict[str, Products] = {"": inner_products, ", candidate bmm": batched, ", candidate rounded products": rounded}


def seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Median, waiting for the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(rounds + 2):  # the first two load kernels and grow the allocator's pool
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def exact(forget: list[Tensor], retain: list[Tensor]) -> Tensor:
    pairs = ((forget, forget), (forget, retain), (retain, retain))
    return torch.stack(
        [sum((a.double() * b.double()).sum() for a, b in zip(*pair, strict=True)).cpu() for pair in pairs]
    )


def compare(size: str, config: LlamaConfig, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, object]]:
    generator = torch.Generator(options.device).manual_seed(0)
    forget, retain, empty = (
        [torch.empty(shape, dtype=dtype, device=options.device) for shape in shapes(config)] for _ in range(3)
    )
    for tensor in [*forget, *retain]:
        tensor.normal_(generator=generator)
    one = sum(tensor.numel() * tensor.element_size() for tensor in forget)
    copy = seconds(lambda: torch._foreach_copy_(empty, forget), options.device, options.rounds)
    per_byte = copy / (2 * one)
    truth, name = exact(forget, retain), f"{size}, {str(dtype).removeprefix('torch.')}"
    found = [row(f"{name}: copy", 1e-9 / per_byte, "GB/s")]

    def add(what: str, work: Callable[[], object], copies: int) -> None:
        time_ = seconds(work, options.device, options.rounds)
        found.append(row(f"{name}: {what}", 1e3 * time_, "ms"))
        found.append(row(f"{name}: {what}, share of the bandwidth", copies * one * per_byte / time_))

    for label, products in WAYS.items():
        try:
            error = abs(products(forget, retain)[1] - truth[1]) / (truth[0] * truth[2]).sqrt()
        except (RuntimeError, NotImplementedError, TypeError) as refusal:  # an old torch, or a device without it
            print(f"{name}: Gramian{label}: not here: {str(refusal).splitlines()[0][:120]}", flush=True)
            continue
        found.append(row(f"{name}: Gramian{label}, error", float(error), most=1e-5))
        add(f"Gramian{label}", lambda products=products: products(forget, retain), 2)
    add("combination", lambda: add_scaled(retain, forget, 1e-3), 3)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["0.1B", "1B", "3B"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = {size: SHAPES[size] for size in options.sizes}
    if options.tiny:
        sizes, options.rounds = {"tiny": llama(64, 2)}, 1
    logging.set_verbosity_error()
    print(machine(options.device))
    rows: list[dict[str, object]] = []
    for dtype in options.dtypes:
        for size, config in sizes.items():
            new = compare(size, config, getattr(torch, dtype), options)
            rows += new
            print("\n".join(f"{found['what']:60} {found['value']:10.3g} {found['unit']}" for found in new), flush=True)
            write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
