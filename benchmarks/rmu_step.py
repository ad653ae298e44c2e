"""What a step of BLUR-RMU and RMU costs here, against the straightforward form of it: whole models, two of them.

    python benchmarks/rmu_step.py                      # CPU: 12 layers, up to layer 3
    python benchmarks/rmu_step.py --device cuda --size 350M --batch-size 4 --length 512

Straightforward, as the published codes have it: both models run to their last layer and their logits, a hook reads the
layer's output, all parameters of the trained model require a gradient, and three matrices are in the optimizer. The
second form of it freezes what is not trained. Ours: the trainer as it is, up to `Trainer`'s clipping and AdamW step.

Time: in turns in one process, the median over rounds of the ratio within a round. Memory: the peak of three steps in a
process of its own, less what it held before the model was made; both models' weights included.
"""

import argparse
import copy
import statistics
import tempfile
import time

import torch
from measuring import begin, held, in_turns, machine, memory_in_subprocess, peak, ratio, step_options
from rows import row, write_rows
from stepping import PINNED, SIZES, Steps, build_model, rows

from blur_trainer import BLUR, BLURConfig, BLURTrainer, Sum
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.control_vectors import control_vector
from blur_trainer.objectives.rmu import RMU

PLAIN, FROZEN = "two whole models, all gradients", "two whole models, the rest frozen"
OURS, OURS_SUM = "BLUR-RMU, BLURTrainer", "RMU (sum), BLURTrainer"
VARIANTS = (PLAIN, FROZEN, OURS, OURS_SUM)
ALPHA, COEFFICIENT = 800.0, 6.5


class Straightforward:
    """BLUR-RMU without a trainer."""

    def __init__(self, size: str, options: argparse.Namespace, frozen_rest: bool):
        self.model, self.layer, self.options = build_model(size, options.device), options.layer, options
        self.frozen = copy.deepcopy(self.model)
        layers = self.model.model.layers[options.layer - 2 : options.layer + 1]
        self.parameters = [layer.mlp.down_proj.weight for layer in layers]
        if frozen_rest:
            self.model.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.vector = COEFFICIENT * control_vector("forget", self.model.config.hidden_size, 0).to(options.device)
        self.data = [torch.tensor([r["input_ids"] for r in rows(options.length, seed)]) for seed in (1, 2)]
        self.at = 0
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter

    def _hidden(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        handle = model.model.layers[self.layer].register_forward_hook(lambda _, __, output: kept.append(output))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        handle.remove()
        return kept[0][0] if isinstance(kept[0], tuple) else kept[0]

    def _take(self, loss: torch.Tensor) -> list[torch.Tensor]:
        loss.backward()
        taken = [parameter.grad.clone() for parameter in self.parameters]
        self.model.zero_grad()
        return taken

    def __call__(self) -> float:
        """Seconds."""
        sync = torch.cuda.synchronize if self.options.device == "cuda" else lambda: None
        sync()
        start = self.clock()
        size = self.options.batch_size
        forget, retain = (ids[self.at : self.at + size].to(self.options.device) for ids in self.data)
        self.at = (self.at + size) % (len(self.data[0]) - size + 1)
        f = self._take((self._hidden(self.model, forget) - self.vector).square().mean())
        with torch.no_grad():
            goal = self._hidden(self.frozen, retain)
        r = self._take((self._hidden(self.model, retain) - goal).square().mean())
        rho = sum((a * b).sum() for a, b in zip(f, r, strict=True)) / sum(a.square().sum() for a in f)
        for parameter, a, b in zip(self.parameters, f, r, strict=True):
            parameter.grad = a + ALPHA * (b - rho * a)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        sync()
        return self.clock() - start


def make(variant: str, options: argparse.Namespace, folder: str) -> Straightforward | Steps:
    if variant in (PLAIN, FROZEN):
        return Straightforward(options.size, options, variant == FROZEN)
    numbers = ",".join(str(options.layer - n) for n in (2, 1, 0))
    config = BLURConfig(
        folder,
        per_device_train_batch_size=options.batch_size,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        report_to="none",
        disable_tqdm=True,
        train_layers=numbers,
        train_parameters="mlp.down_proj",
        **PINNED,
    )
    trainer = BLURTrainer(
        build_model(options.size, options.device),
        config,
        rows(options.length, seed=1),
        rows(options.length, seed=2),
        rule=BLUR(alpha=ALPHA) if variant == OURS else Sum(1.0, 1200.0),
        forget_objective=RMU(options.layer, coefficient=COEFFICIENT),
        retain_objective=ActivationMatch(options.layer),
    )
    return Steps.of(trainer, options)


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step and variant, one entry per round."""
    with tempfile.TemporaryDirectory() as folder:
        return in_turns({variant: make(variant, options, folder) for variant in VARIANTS}, options.rounds)


def peak_bytes(variant: str, options: argparse.Namespace) -> int:
    """In this process: weights of both models, moments and activations."""
    before = held(options.device)
    with tempfile.TemporaryDirectory() as folder:
        return peak(make(variant, options, folder), options.device) - before


def memory(variant: str, options: argparse.Namespace) -> float | None:
    """MiB, measured in a process of its own."""
    found = memory_in_subprocess(__file__, variant, options, size=options.size, layer=options.layer)
    return None if found is None else found / 2**20


def report(options: argparse.Namespace) -> None:
    seconds = times(options)
    peaks = {variant: memory(variant, options) for variant in VARIANTS}
    print(f"{'':36} {'ms / step':>10} {'peak MiB':>9}")
    for variant in VARIANTS:
        peak = "-" if peaks[variant] is None else f"{peaks[variant]:.0f}"
        print(f"{variant:36} {1e3 * statistics.median(seconds[variant]):10.0f} {peak:>9}")
    found = []
    for ours in (OURS, OURS_SUM):
        for other in (PLAIN, FROZEN):
            median, low, high = ratio(seconds, other, ours)
            bound = {"least": 2.5} if other == PLAIN else {}
            found.append(row(f"time, {other} / {ours}", median, spread=(low, high), **bound))
            aim = ("met    " if median >= 2.5 else "MISSED ") if other == PLAIN else "       "
            print(f"{aim} time, {other} / {ours}, >= 2.5: {median:.2f} ({low:.2f}-{high:.2f})")
            if None not in peaks.values():
                share = peaks[ours] / peaks[other]
                found.append(row(f"memory, {ours} / {other}", share, **({"most": 0.6} if other == PLAIN else {})))
                aim = ("met    " if share <= 0.6 else "MISSED ") if other == PLAIN else "       "
                print(f"{aim} memory, {ours} / {other}, <= 0.6: {share:.2f}", flush=True)
    write_rows(options.json, found)


def main() -> None:
    parser = step_options(__doc__, VARIANTS, rounds=9, batch_size=4, length=128)
    parser.add_argument("--size", choices=list(SIZES), default="27M")
    parser.add_argument("--layer", type=int, default=3, help="whose output both objectives look at")
    options = begin(parser)
    if options.memory_of:
        print(peak_bytes(options.memory_of, options))
        return
    print(machine(options.device))
    print(
        f"{options.size}, layer {options.layer} of {SIZES[options.size][1]}, {options.rounds} rounds, "
        f"{options.batch_size} x {options.length} tokens per role"
    )
    report(options)
    print(f"\nAt the end: {machine(options.device)}")


if __name__ == "__main__":
    main()
