"""A fake accelerator: its tensors compute on the CPU, and everything that would reach a GPU is counted.

    with FakeDevice() as device:
        model.to(DEVICE)
        device.clear()
        ...
        device.waits  # where the host waited for the device, by caller

A tensor on it is a wrapper around a CPU tensor that says its device is `meta`, which every build of torch has and whose
gradients are computed in the calling thread. So `.item()`, `.cpu()`, `bool(x)` and `torch.tensor(..., device=...)` are
told apart from the same calls on tensors of the CPU, and a mix of both devices is an error, as on a GPU.

Counted are torch's operators after decomposition, without views. That is about the number of kernel launches, but
attention is the plain formula here, one kernel on most GPUs; some operators launch several kernels.
"""

import functools
import os
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE, HOST = torch.device("meta"), torch.device("cpu")
# The callers that are told: what is nearest to the operator. torch's own files are left out but for these.
OWNERS = ("blur_trainer/", "transformers/", "accelerate/", "trl/", "peft/", "torch/optim/", "benchmarks/", "tests/")
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2", "unique_dim")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
KERNELS = {"logsumexp": 9}  # where an operator launches several: amax, abs, eq, masked_fill, sub, exp, sum, log, add
FREE = (
    "_unsafe_view",
    "detach",
    "alias",
    "lift_fresh",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
)


class OnDevice(torch.Tensor):
    """A tensor of the fake accelerator."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        made.inner = inner
        return made

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("A tensor of the fake accelerator is used outside `with FakeDevice()`.")


class FakeDevice:
    """Counts by caller, `path:line`, while its context is open. Of a backward pass the caller is who asked for it.

    `operators`: what would launch kernels. `waits`: the host reads a value (`.item()`, `bool`, a boolean mask as an
    index) or copies to its memory. `uploads`: a copy from the host's pageable memory, for which CUDA waits too.
    `bytes`: what operators write.
    """

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        for counter in (self.operators, self.waits, self.uploads, self.bytes):
            counter.clear()

    def __enter__(self) -> "FakeDevice":
        self._stack = ExitStack()
        # `TrainingArguments` and `Accelerator` read it
        self._stack.enter_context(mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": DEVICE.type}))
        supported = mock.Mock(return_value=["cuda", "cpu", DEVICE.type])  # optimizers and clipping as on a GPU
        self._stack.enter_context(mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", supported))
        self._stack.enter_context(mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True))
        self._stack.enter_context(_Functions())
        self._stack.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        mine = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
        asked = kwargs.get("device")
        here = bool(mine) if asked is None else torch.device(asked).type == DEVICE.type
        name = func.overloadpacket.__name__
        if not mine and not here:
            return func(*args, **kwargs)
        if name == "copy_":  # the destination says where the result is
            here = isinstance(args[0], OnDevice)
        foreign = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
        if mine and foreign and name not in ("copy_", *INDEXED):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, also those of {caller()}")
        plain = {key: HOST if key == "device" and asked is not None else _unwrapped(v) for key, v in kwargs.items()}
        result = func(*tree_map(_unwrapped, args), **plain)
        self._count(func, name, tensors, bool(mine), here, result)
        if not here:
            return result
        return tree_map(lambda x: mine.get(id(x), OnDevice(x)) if isinstance(x, torch.Tensor) else x, result)

    def _count(self, func: Any, name: str, tensors: list[Any], read: bool, here: bool, result: Any) -> None:
        who = caller()
        masked = name in INDEXED and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if name in READS or (read and not here) or masked:
            self.waits[who] += 1
        copies = here and name in ("_to_copy", "copy_", *INDEXED)
        if copies and any(t.numel() and not isinstance(t, OnDevice) for t in tensors):
            self.uploads[who] += 1
        views = any(output.alias_info and not output.alias_info.is_write for output in func._schema.returns)
        if here and not views and name not in FREE:
            self.operators[who] += KERNELS.get(name, 1)
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.bytes[who] += sum(x.numel() * x.element_size() for x in outputs)


class _Dispatch(TorchDispatchMode):
    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.device.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does in C++ before any operator is dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].detach().to(HOST).tolist()
        return func(*args, **kwargs)


def _unwrapped(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def caller() -> str:
    """The nearest frame outside of torch, as `path:line`."""
    frame = sys._getframe(1)
    while frame is not None:
        if path := _told(frame.f_code.co_filename):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@functools.cache
def _told(path: str) -> str | None:
    """The path from the name of the package on, if callers in this file are told."""
    found = [path[path.rindex(owner) :] for owner in OWNERS if owner in path]
    return min(found, key=len) if found and path != __file__ else None
