"""An accelerator for machines without one: torch's `meta` device, and a record of what it would move and wait for."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")  # it computes shapes, no numbers


class FakeAccelerator(TorchDispatchMode):
    """Inside, tensors on `DEVICE` can be copied to the CPU, as ones, and page-locked memory is what a CPU has.

    `moves`: each copy between CPU and device, as `(direction, elements)`. `waits`: how often the host waits for the
    device: a copy to the CPU, or a number that is read. `pinned`: tensors allocated in page-locked memory.
    `most_on_device`: elements that came from the CPU and were on the device at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[str, int]] = []
        self.waits = self.pinned = self.most_on_device = 0
        self._there: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            self.pinned += 1
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == DEVICE:
            return self._to_host(args[0]).flatten()[0].tolist()
        if func is torch.ops.aten.copy_.default and args[0].is_cpu and args[1].device == DEVICE:
            return args[0].fill_(self._to_host(args[1]).flatten()[0].item())
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            goes = torch.device(kwargs["device"])
            if goes.type == "cpu" and args[0].device == DEVICE:
                return self._to_host(args[0])
            if goes == DEVICE and args[0].is_cpu:
                return self._to_device(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _to_host(self, tensor: Tensor) -> Tensor:
        self.moves.append(("to host", tensor.numel()))
        self.waits += 1
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def _to_device(self, tensor: Tensor) -> Tensor:
        self.moves.append(("to device", tensor.numel()))
        self._there.append(weakref.ref(tensor))
        alive = [there for ref in self._there if (there := ref()) is not None]
        self.most_on_device = max(self.most_on_device, sum(there.numel() for there in alive))
        return tensor
