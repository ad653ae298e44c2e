"""One pass for both gradients instead of two? LoRA: forget and retain rows in one batch, gradients parted by rows.

    python benchmarks/one_pass.py                       # two minutes of a core
    python benchmarks/one_pass.py --width 2048 --layers 16 --device cuda --batch-size 8 --length 512

Two passes: forward and backward of the forget batch, then of the retain batch, as the trainer does. One pass: both
batches in one forward and one backward; the inputs and the output gradients of each LoRA factor are kept, and its two
gradients are products of their rows. NLL for both. Printed: the greatest difference of the gradients, the median times
and their ratio, the kernels per step (operators that compute), and what is kept for the backward pass.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import in_turns, ratio
from peft import LoraConfig, get_peft_model
from shapes import llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from blur_trainer.models.forward import answer_logps

Gradients = dict[str, dict[str, Tensor]]
ROLES = ("forget", "retain")


def model_of(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(options.width, options.layers)).to(options.device)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def batch(rows: int, length: int, vocabulary: int, device: str, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def two_passes(model: Any, batches: dict[str, dict[str, Tensor]]) -> Gradients:
    found: Gradients = {}
    for role, rows in batches.items():
        model.zero_grad(set_to_none=True)
        (-answer_logps(model, rows).mean()).backward()
        found[role] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found


class OnePass:
    """Hooks on the factors of a LoRA. Their own gradients are switched off, and the graph begins at the embedding."""

    def __init__(self, model: Any) -> None:
        self.model, self.inputs, self.found = model, {}, {role: {} for role in ROLES}
        model.enable_input_require_grads()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lora_" in name:
                module.weight.requires_grad_(False)
                module.register_forward_hook(self._keep(name))
                module.register_full_backward_hook(self._part(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.inputs[name] = inputs[0].detach()

        return hook

    def _part(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, into: Any, out: tuple[Tensor]) -> None:
            x, y = self.inputs.pop(name), out[0]
            half = len(x) // 2
            for role, rows in zip(ROLES, (slice(None, half), slice(half, None)), strict=True):
                gradient = y[rows].flatten(0, 1).T @ x[rows].flatten(0, 1)
                self.found[role][f"{name}.weight"] = gradient

        return hook

    def __call__(self, batches: dict[str, dict[str, Tensor]]) -> Gradients:
        both = {key: torch.cat([batches[role][key] for role in ROLES]) for key in batches["forget"]}
        logps = answer_logps(self.model, both)
        half = len(logps) // 2
        (-logps[:half].mean() - logps[half:].mean()).backward()
        return self.found


def timed(step: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernels(step: Callable[[], Any], device: str) -> int:
    """What computes: on a GPU its kernels, on a CPU operators that call no other one and move no view."""
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
    if device == "cuda":
        return sum(event.count for event in profile.key_averages())
    computes = [event for event in profile.events() if event.name.startswith("aten::") and not event.cpu_children]
    views = ("view", "as_strided", "empty", "select", "slice", "alias", "expand", "transpose", "detach", "resolve")
    return sum(not any(word in event.name for word in views) for event in computes)


def saved(model: Any, rows: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = -answer_logps(model, rows).mean()
    del loss
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4], help="rows of each set")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device, plain, parted = options.device, model_of(options), OnePass(model_of(options))
    size = sum(p.numel() for p in plain.parameters()) / 1e6
    for rows in options.batch_size:
        vocabulary = plain.config.vocab_size
        batches = {role: batch(rows, options.length, vocabulary, device, i) for i, role in enumerate(ROLES)}
        steps = {"two": partial(two_passes, plain, batches), "one": partial(parted, batches)}
        want, got = steps["two"](), steps["one"]()
        off = max(
            ((got[role][name] - gradient).norm() / gradient.norm()).item()
            for role in ROLES
            for name, gradient in want[role].items()
        )
        counts = {name: kernels(step, device) for name, step in steps.items()}
        both = {key: torch.cat([batches[role][key] for role in ROLES]) for key in batches["forget"]}
        kept = {"two": saved(plain, batches["forget"]), "one": saved(parted.model, both)}
        seconds = in_turns({name: partial(timed, step, device) for name, step in steps.items()}, options.rounds)
        median, low, high = ratio(seconds, "one", "two")
        print(
            f"{size:.0f} M parameters, {rows} and {rows} rows of {options.length} tokens: gradients off by {off:.0e}; "
            f"time of one pass in those of two {median:.2f} ({low:.2f} to {high:.2f}); kernels {counts['one']} and "
            f"{counts['two']}, ratio {counts['one'] / counts['two']:.2f}; kept for the backward "
            f"pass {kept['one'] / 2**20:.0f} and {kept['two'] / 2**20:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
