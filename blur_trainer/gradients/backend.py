"""The backend holds the two gradients. This one serves one process and DDP, where `.grad` is the whole gradient.

Each objective makes one pass over the accumulation window, with the engine's own accumulation and reduction. Then
`take` moves the finished gradient to its slot. After the last pass the trainer calls `gramian`, then `write` or
`discard`.
Sharding engines override how a gradient is read, emptied and written (`_read`, `_empty`, `_put`) and how the processes'
shares of an inner product are summed (`shared`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations_with_replacement, zip_longest
from typing import ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blur_trainer.constants import ROLES
from blur_trainer.gradients.mask import Mask
from blur_trainer.gradients.retain_mean import Gradients, RetainMean
from blur_trainer.gradients.sums import add_scaled

# Elements per float32 dot product: on a CPU a chunk fits into a cache; on a GPU it is large, to hide kernel launches.
_CHUNK, _CHUNK_ON_ACCELERATOR = 2**18, 2**26


class GradientBackend:
    """Gradients of one process, or of DDP after its all-reduce.

    Memory: one gradient copy more than training with one loss. With `offload_forget_gradient` that copy is in the CPU's
    memory and returns to the device tensor by tensor. Time: one pass over the gradients for the inner products and one
    for the combination.
    """

    #: each process has its own share of a gradient, not all of it
    sharded: ClassVar[bool] = False

    def __init__(self, accelerator: Accelerator, model: nn.Module, offload_forget_gradient: bool = False):
        self.accelerator = accelerator
        self.model = model
        self.offload_forget_gradient = offload_forget_gradient
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._trainable = self._flags()
        self.slots: dict[str, Gradients] = {}
        #: of the last steps, where the rule asks for it
        self.retain_mean: RetainMean | None = None
        #: of the entries that may change; `None`: all
        self.mask: Mask | None = None
        # With DDP, `.grad` can be a view of a communication bucket, which the next pass overwrites. Then copy it.
        self._grads_are_views = any(
            isinstance(module, DistributedDataParallel) and module.gradient_as_bucket_view for module in model.modules()
        )

    def _flags(self) -> list[bool]:
        return [p.requires_grad for p in self.model.parameters()]

    def changed(self) -> list[str]:
        """The names of parameters that were frozen or unfrozen since. If there are any, a new backend is needed."""
        flags = self._flags()
        if flags == self._trainable:
            return []
        names = [name for name, _ in self.model.named_parameters()]
        return [name for name, *both in zip_longest(names, flags, self._trainable) if both[0] != both[1]]

    # ---- the life of a gradient ----

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Context of one micro-batch's forward and backward. Only the last one of a pass reduces over the processes."""
        every = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return nullcontext() if last or every else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def take(self, role: str) -> None:
        """Ends a pass: moves its gradient to the slot `role` and empties the engine's gradient."""
        to_host = role == "forget" and self.offload_forget_gradient
        # one tensor at a time: copies that `_read` makes are never on the device all at once
        self.slots[role] = [_to_host(g) if to_host and g is not None else g for g in self.masked(self._read())]
        self._empty()

    def masked(self, gradients: Iterable[Tensor | None]) -> Iterable[Tensor | None]:
        """Makes gradients 0, in place, where a mask says that an entry may not change."""
        return gradients if self.mask is None else self.mask.apply(gradients)

    def gramian(self) -> Tensor:
        """`(2, 2)` float64 on the CPU, order forget, retain. The row of a role without a pass is 0.

        With `retain_mean` it is `(3, 3)`: that mean, with this step's gradient, is the third. It waits for the device
        once per optimizer step, for three numbers (with the mean: six). Shares are summed over the processes. A loss
        scale is divided out.
        """
        count = max(map(len, self.slots.values()))
        forget, retain = (self.slots.get(role, [None] * count) for role in ROLES)
        if self.retain_mean is None:
            entries = self.shared(inner_products(forget, retain)) / self._loss_scale() ** 2
            return entries[[0, 1, 1, 2]].view(2, 2)
        self.retain_mean.fit(retain)
        mean = self.retain_mean.gradients or [None] * count
        entries = self.shared(inner_products(forget, retain, mean)) / self._loss_scale() ** 2
        return self.retain_mean.gramian(entries[[0, 1, 2, 1, 3, 4, 2, 4, 5]].view(3, 3))

    def norm(self, role: str) -> float:
        """The norm of the gradient in a slot, over all processes. A loss scale is in it."""
        return float(self.shared(inner_products(self.slots[role]))[0].sqrt())

    def write(self, weights: Tensor) -> None:
        """Puts `weights[0] g_f + weights[1] g_r` where the optimizer reads its gradient, and frees the slots.

        With `retain_mean`, that takes in this step's gradient and is added, times `weights[2]`. Not, if these are NaN.
        """
        scalars = dict(zip(ROLES, weights.tolist(), strict=False))
        if self.retain_mean is not None and weights.isfinite().all():
            self.retain_mean.update(self.slots["retain"])
        (first, *others) = [role for role in ROLES[::-1] if role in self.slots]
        combined = self.slots.pop(first)
        if scalars[first] != 1.0:  # skipping weight 1 (often BLUR's upper level) saves a pass over the gradients
            torch._foreach_mul_([g for g in combined if g is not None], scalars[first])
        for role in others:
            combined = add_scaled(combined, self.slots.pop(role), scalars[role])
        if self.retain_mean is not None and self.retain_mean.gradients and weights[2] != 0:
            combined = add_scaled(combined, self.retain_mean.gradients, float(weights[2]), keep=True)
        self._put(combined)

    def discard(self) -> None:
        """Drops both gradients. The next optimizer step then changes neither weights nor moments."""
        self.slots.clear()
        self._empty()

    @property
    def skips_overflow(self) -> bool:
        """Whether a loss scaler checks for inf and NaN, skips the step and lowers its scale."""
        return self.accelerator.scaler is not None and self.accelerator.scaler.is_enabled()

    # ---- where an engine keeps its gradient ----

    def _read(self) -> Iterator[Tensor | None]:
        """Goes through this process's share of the finished gradient, in tensors that the next pass does not change."""
        for parameter in self.parameters:
            gradient = parameter.grad
            yield gradient.clone() if self._grads_are_views and gradient is not None else gradient

    def _empty(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _put(self, gradients: Gradients) -> None:
        frozen = [True] * len(gradients) if self.mask is None else self.mask.frozen
        for parameter, gradient, place in zip(self.parameters, gradients, frozen, strict=True):
            # without a gradient the optimizer makes no state: where no entry may change, none is needed
            parameter.grad = None if gradient is None or place is None else gradient.to(parameter.device)

    def _weights(self) -> Iterator[Tensor | None]:
        """Goes through this process's share of the weights, in the places of `_read`, to be changed in place."""
        yield from (parameter.data for parameter in self.parameters)

    def owners(self) -> Iterator[list[tuple[nn.Parameter, slice]]]:
        """Goes through the places of `_read`: the parameters whose entries are there, and where in the flat tensor."""
        yield from ([(parameter, slice(None))] for parameter in self.parameters)

    def _publish(self) -> None:
        """Lets the model compute with the changed shares. Here it does so anyway."""

    def shared(self, products: Tensor) -> Tensor:
        """Inner products of this process's share -> those of the whole gradient, the same on every process.

        Here each process has the whole gradient. The numbers of process 0 count: elsewhere the last bit may differ,
        which would let the weights drift apart, or one process skip a step that the others make.
        """
        if self.accelerator.num_processes == 1:
            return products
        return broadcast(products.to(self.accelerator.device)).cpu()

    def _loss_scale(self) -> float:
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler and self.skips_overflow else 1.0


def inner_products(*gradients: Sequence[Tensor | None]) -> Tensor:
    """The inner products of all pairs, each over all tensors at once, float64 on the CPU.

    Order: of two `(<f,f>, <f,r>, <r,r>)`, of three `(<f,f>, <f,r>, <f,m>, <r,r>, <r,m>, <m,m>)`. Products are float32
    per chunk, sums are float64: on a CPU a float32 sum over millions of terms is wrong in the fifth digit. It works
    chunk by chunk on the last gradient's device. Only products of two gradients are widened to float32 on an
    accelerator (H100, 1.2 billion bfloat16: 40 ms with three widened products, 16 with one).
    """
    pairs = list(combinations_with_replacement(range(len(gradients)), 2))
    products: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in pairs}
    resident: list[list[Tensor]] = [[] for _ in gradients]  # on an accelerator: norms of all tensors in few kernels
    for parts in zip(*gradients, strict=True):
        home = next((g.device for g in reversed(parts) if g is not None), None)
        on_host = home is None or home.type == "cpu"
        for mine, gradient in zip(resident, parts, strict=True):
            if not on_host and gradient is not None and gradient.device == home:
                mine.append(gradient)
        # an offloaded slot, and everything on a CPU, is squared chunk by chunk
        squared = [g is not None and (on_host or g.device != home) for g in parts]
        size = _CHUNK if on_host else _CHUNK_ON_ACCELERATOR
        for chunks in zip_longest(*(() if g is None else g.flatten().split(size) for g in parts)):
            here = [c if c is None else c.to(home, non_blocking=True) for c in chunks]
            for i, j in pairs:
                a, b = here[i], here[j]
                if i == j and a is not None and squared[i]:
                    products[i, i].append(_square(a))
                elif i != j and a is not None and b is not None:
                    products[i, j].append(torch.dot(_widened(a), _widened(b)))
    for i, mine in enumerate(resident):
        products[i, i] += _squares(mine)
    flat = [product for part in products.values() for product in part]
    if not flat:
        return torch.zeros(len(pairs), dtype=torch.float64)
    device = flat[-1].device  # a model spread over several devices: collect on the last one
    numbers = torch.stack([product.to(device) for product in flat]).cpu().double()
    return torch.stack([part.sum() for part in numbers.split([len(part) for part in products.values()])])


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _squares(tensors: list[Tensor]) -> list[Tensor]:
    """`<x, x>` of each, on an accelerator: some kernels for all of them, where one each would keep the host busy."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    squares: list[Tensor] = []
    for (_, dtype), group in groups.items():
        norms = torch._foreach_norm(group, 2, dtype=torch.promote_types(dtype, torch.float32))
        torch._foreach_mul_(norms, norms)
        squares += norms
    return squares


def _square(x: Tensor) -> Tensor:
    """`<x, x>`. An accelerator's norm accumulates in float32 while it reads bfloat16 as it is."""
    if x.is_cpu:
        return torch.dot(_widened(x), _widened(x))
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square()


def _to_host(gradient: Tensor) -> Tensor:
    """A copy in page-locked memory (where there is a GPU to copy from)."""
    if gradient.is_cpu:
        return gradient
    host = torch.empty_like(gradient, device="cpu", pin_memory=True)
    return host.copy_(gradient, non_blocking=False)
