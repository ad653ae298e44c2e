"""Who holds the two gradients, and where. This module: one process and DDP, where `.grad` is the whole gradient.

One pass per objective over the accumulation window, then `take`: the engine's own accumulation and reduction are used
as they are, and the finished gradient moves to its slot. After the last pass `gramian`, then `write` or `discard`.
Engines that shard override where a gradient is read, emptied and put (`_read`, `_empty`, `_put`) and how the processes'
shares of an inner product add up (`_reduce`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blur_trainer.constants import ROLES

# elements per float32 dot product: of the size of a cache, or large enough to hide the launch of a kernel
_CHUNK, _CHUNK_ON_ACCELERATOR = 2**18, 2**26

Gradients = list[Tensor | None]


class GradientBackend:
    """Gradients of one process, or of DDP after its all-reduce (equal on all ranks, so nothing is reduced here).

    Memory: one gradient copy beyond what training with one loss holds; none on the device with
    `offload_forget_gradient`, which keeps the forget slot in the CPU's memory until both gradients meet, tensor by
    tensor. Time: one pass over the gradients for the inner products and one for the combination.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, offload_forget_gradient: bool = False):
        self.accelerator = accelerator
        self.model = model
        self.offload_forget_gradient = offload_forget_gradient
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.slots: dict[str, Gradients] = {}
        # DDP can make `.grad` a view of its communication bucket, which the next pass overwrites: then copy
        self._grads_are_views = any(
            isinstance(module, DistributedDataParallel) and module.gradient_as_bucket_view for module in model.modules()
        )

    # ---- the life of a gradient ----

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Wraps forward and backward of one micro-batch; only the pass's last one reduces over the processes."""
        every = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return nullcontext() if last or every else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def take(self, role: str) -> None:
        """End of a pass: its gradient moves to the slot `role`, and the engine's gradient is empty again."""
        gradients = self._read()
        if role == "forget" and self.offload_forget_gradient:
            gradients = [None if g is None else _to_host(g) for g in gradients]
        self.slots[role] = gradients
        self._empty()

    def gramian(self) -> Tensor:
        """`(2, 2)` float64 on the CPU, order forget, retain; the row of a role without a pass is 0.

        Reading it waits for the device, three numbers once per optimizer step, summed over the processes where each
        holds a share. Gradients under a loss scale carry it; it is divided out.
        """
        count = max(map(len, self.slots.values()))
        forget, retain = (self.slots.get(role, [None] * count) for role in ROLES)
        entries = self._reduce(inner_products(forget, retain)) / self._loss_scale() ** 2
        return torch.stack([entries[0], entries[1], entries[1], entries[2]]).view(2, 2)

    def write(self, weights: Tensor) -> None:
        """The optimizer finds `weights[0] g_f + weights[1] g_r` as its gradient; the slots are free afterwards."""
        scalars = dict(zip(ROLES, weights.tolist(), strict=True))
        (first, *others) = [role for role in ROLES[::-1] if role in self.slots]
        combined = self.slots.pop(first)
        if scalars[first] != 1.0:  # BLUR's upper level, as a rule: one pass over the gradients saved
            torch._foreach_mul_([g for g in combined if g is not None], scalars[first])
        for role in others:
            combined = add_scaled(combined, self.slots.pop(role), scalars[role])
        self._put(combined)

    def discard(self) -> None:
        """Forgets both gradients: an optimizer step now leaves weights and moments as they are."""
        self.slots.clear()
        self._empty()

    @property
    def skips_overflow(self) -> bool:
        """Whether a loss scaler looks for inf and NaN itself, skips the step and lowers its scale."""
        return self.accelerator.scaler is not None and self.accelerator.scaler.is_enabled()

    # ---- where an engine keeps it ----

    def _read(self) -> Gradients:
        """This process's share of the finished gradient, in tensors that the next pass leaves alone."""
        return [p.grad.clone() if self._grads_are_views and p.grad is not None else p.grad for p in self.parameters]

    def _empty(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _put(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.to(parameter.device)

    def _reduce(self, products: Tensor) -> Tensor:
        """`(3,)` of this process's share -> of the whole gradient."""
        return products

    def _loss_scale(self) -> float:
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler and self.skips_overflow else 1.0


def add_scaled(mine: Gradients, others: Gradients, weight: float) -> Gradients:
    """`mine + weight * others` in place of either; a parameter may have a gradient in one of them only."""
    together = [(m, o) for m, o in zip(mine, others, strict=True) if m is not None and o is not None]
    if together and all(m.device == o.device for m, o in together):  # foreach refuses empty lists
        torch._foreach_add_([m for m, _ in together], [o for _, o in together], alpha=weight)
    else:
        for m, o in together:  # one at a time: an offloaded slot never is on the device as a whole
            m.add_(o.to(m.device, non_blocking=True), alpha=weight)
    return [o.mul_(weight) if m is None and o is not None else m for m, o in zip(mine, others, strict=True)]


def inner_products(forget: Sequence[Tensor | None], retain: Sequence[Tensor | None]) -> Tensor:
    """`(<f,f>, <f,r>, <r,r>)` over all tensors at once, `(3,)` float64 on the CPU.

    Products in float32 per chunk (a float32 sum over millions of terms is wrong in the fifth digit on a CPU), sums in
    float64; a chunk is read from memory once for all three, on the device of the retain gradient.
    """
    products: list[list[Tensor]] = [[], [], []]
    for pair in zip(forget, retain, strict=True):
        home = next((g.device for g in reversed(pair) if g is not None), None)
        size = _CHUNK if home is None or home.type == "cpu" else _CHUNK_ON_ACCELERATOR
        for f, r in zip_longest(*(() if g is None else g.flatten().split(size) for g in pair)):
            f = f if f is None else f.to(home, non_blocking=True)
            for index, (x, y) in enumerate(((f, f), (f, r), (r, r))):
                if x is not None and y is not None:
                    products[index].append(_dot(x, y))
    flat = [product for part in products for product in part]
    if not flat:
        return torch.zeros(3, dtype=torch.float64)
    device = flat[-1].device  # of a model spread over several, the last one collects
    numbers = torch.stack([product.to(device) for product in flat]).cpu().double()
    return torch.stack([part.sum() for part in numbers.split([len(part) for part in products])])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y) if x.dtype == torch.float64 else torch.dot(x.float(), y.float())


def _to_host(gradient: Tensor) -> Tensor:
    """A copy in page-locked memory (where there is a GPU to copy from)."""
    if gradient.is_cpu:
        return gradient
    host = torch.empty_like(gradient, device="cpu", pin_memory=True)
    return host.copy_(gradient, non_blocking=False)
