"""A CPU process that believes to be one of the ranks on a host with several GPUs.

    with FakeCuda(gpus=4) as fake: ...                          # in this process; LOCAL_RANK says which rank
    torchrun ... tests/support/fake_cuda.py 4 FOLDER SCRIPT ... # a script, on every rank; FOLDER/{rank}.json is left

A tensor "on cuda:k" is a CPU tensor that carries this name: its `device` says so, what is computed from it has it too,
and it must not meet a tensor of another place, as on a GPU. The process group is gloo where NCCL is asked for, and
refuses what NCCL refuses, tensors of the CPU. What happened is kept in `events`:

| kind | what |
|---|---|
| `set_device` | the index that became the current device |
| `to` | a tensor went to this device |
| `group` | a process group was asked for, with this backend |
| `collective` | its name; shape and dtype of the tensor, or for objects the current device and whether tensors are in |
| `forward` | of a DDP model: whether gradients are reduced, and a digest of the input |
| `ddp`, `data_parallel` | a model was wrapped: its `device_ids` |
| `mixed` | an operation on tensors of several places, which a GPU refuses |
| `wrote` | a path under the watched folder |

Not real: times, memory, precision of the kernels, streams, what C++ does by itself.
"""

import functools
import hashlib
import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

GB = 2**30
PROPERTIES = SimpleNamespace(
    name="Fake H100", major=9, minor=0, total_memory=80 * GB, multi_processor_count=132, uuid="0", gcnArchName=""
)
#: that may have operands in two places
_APART = {
    *("copy_", "__getitem__", "__setitem__", "index", "index_put_", "__set__", "data"),
    "_has_compatible_shallow_copy_type",
}
_TENSORS = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce"),
    "gather",
)
_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
_CALLED = {torch.Tensor.device.__get__: "device", torch.Tensor.is_cuda.__get__: "is_cuda", torch.Tensor.to: "to"}
_CALLED |= {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: "cuda", torch.Tensor.backward: "backward"}
_CALLED |= {torch.Tensor.is_cpu.__get__: "is_cpu", torch.Tensor.get_device: "get_device", torch.Tensor.type: "type"}
_CALLED |= {torch.Tensor.numpy: "numpy", torch.Tensor.__array__: "numpy", torch.Tensor.data.__set__: "set_data"}
_CALLED |= {torch.Tensor.pin_memory: "pin_memory", torch.Tensor.is_pinned: "is_pinned"}


def home(tensor: Tensor) -> torch.device | None:
    """The GPU that a tensor is on; `None` for the CPU."""
    return tensor.__dict__.get("fake_home")


def put(tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is None:
        tensor.__dict__.pop("fake_home", None)
    else:
        tensor.__dict__["fake_home"] = device
    return tensor


class FakeCuda(TorchFunctionMode):
    """See the module's table."""

    def __init__(self, gpus: int) -> None:
        super().__init__()
        self.gpus, self.current, self.events = gpus, 0, []
        self._undo: list[tuple[Any, str, Any]] = []

    # ---- what is asked of tensors ----

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _CALLED.get(func)
        if special is not None:
            return getattr(self, f"_{special}")(func, *args, **kwargs)
        kwargs.pop("pin_memory", None)
        target, given = None, "device" in kwargs and kwargs["device"] is not None
        if given:
            target = self._gpu(kwargs["device"])
            if target is not None:
                kwargs["device"] = "cpu"
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        self._check_mixed(func, inputs)
        found = func(*args, **kwargs)
        if not given:
            target = next((home(value) for value in inputs if home(value) is not None), None)
        if target is not None or given:
            for value in tree_iter(found):
                if isinstance(value, Tensor) and not value.is_meta and not any(value is one for one in inputs):
                    put(value, target)
        return found

    def _gpu(self, device: Any) -> torch.device | None:
        """The GPU that is meant, `None` for another device."""
        if isinstance(device, int):
            return torch.device("cuda", device)
        device = torch.device(device)
        if device.type != "cuda":
            return None
        index = self.current if device.index is None else device.index
        if index >= self.gpus:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {self.gpus}")
        return torch.device("cuda", index)

    def _check_mixed(self, func: Any, inputs: list[Tensor]) -> None:
        name = getattr(func, "__name__", str(func))
        if name in _APART:
            return
        places = {home(value) for value in inputs if value.dim() > 0 and not value.is_meta}
        places |= {home(value) for value in inputs if home(value) is not None}
        if len(places) > 1:
            self.note("mixed", name, sorted(map(str, places)), [tuple(value.shape) for value in inputs])

    def _device(self, func: Any, tensor: Tensor) -> torch.device:
        return home(tensor) or func(tensor)

    def _is_cuda(self, func: Any, tensor: Tensor) -> bool:
        return home(tensor) is not None

    def _is_cpu(self, func: Any, tensor: Tensor) -> bool:
        return home(tensor) is None and func(tensor)

    def _get_device(self, func: Any, tensor: Tensor) -> int:
        return -1 if home(tensor) is None else home(tensor).index

    def _numpy(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if home(tensor) is not None:
            raise TypeError(f"can't convert {home(tensor)} device type tensor to numpy.")
        return func(tensor, *args, **kwargs)

    def _set_data(self, func: Any, tensor: Tensor, value: Tensor) -> None:
        func(tensor, value)
        put(tensor, home(value))

    def _type(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = func(tensor, *args, **kwargs)
        if isinstance(found, Tensor):
            return put(found, home(tensor))
        return found if home(tensor) is None else found.replace("torch.", "torch.cuda.")

    def _pin_memory(self, func: Any, tensor: Tensor, device: Any = None) -> Tensor:
        if home(tensor) is not None:
            raise RuntimeError("cannot pin a tensor of a GPU: only dense CPU tensors can be pinned")
        return tensor

    def _is_pinned(self, func: Any, tensor: Tensor, device: Any = None) -> bool:
        return False

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs, target = list(args), dict(kwargs), "stays"
        if args and isinstance(args[0], Tensor):
            other = args.pop(0)
            target = home(other)
            if target is None and other.device.type != "cpu":
                target = "stays"
            args[:0] = [other.device, other.dtype]
        elif args and isinstance(args[0], str | int | torch.device) and not isinstance(args[0], bool):
            target = self._gpu(args[0])
            args[0] = "cpu" if target is not None else args[0]
        elif kwargs.get("device") is not None:
            target = self._gpu(kwargs["device"])
            kwargs["device"] = "cpu" if target is not None else kwargs["device"]
        moved = func(tensor, *args, **kwargs)
        if target == "stays" or moved.is_meta:
            return put(moved, home(tensor)) if moved is not tensor else moved
        if target != home(tensor):
            if target is not None:
                self.note("to", target.index)
            moved = moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved
        return put(moved, target)

    def _cpu(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._to(torch.Tensor.to, tensor, "cpu")

    def _cuda(self, func: Any, tensor: Tensor, device: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        return self._to(torch.Tensor.to, tensor, "cuda" if device is None else device)

    def _backward(self, func: Any, tensor: Tensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
        with self:  # hooks and checkpoints compute in there
            torch.autograd.backward(tensor, gradient, *args, **kwargs)

    # ---- what is asked of the machine ----

    def note(self, kind: str, *what: Any) -> None:
        self.events.append([kind, *what])

    def of(self, kind: str) -> list[Any]:
        """All events of a kind."""
        return [event[1:] for event in self.events if event[0] == kind]

    def set_device(self, device: Any) -> int:
        index = self._gpu("cuda" if device is None else device)
        if index is None:
            raise ValueError(f"Expected a cuda device, but got: {device}")
        before, self.current = self.current, index.index
        self.note("set_device", index.index)
        return before

    def install(self) -> "FakeCuda":
        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        def number(*args: Any, **kwargs: Any) -> int:
            return 0

        answers: dict[str, Any] = {
            "is_available": lambda: self.gpus > 0,
            "device_count": lambda: self.gpus,
            "is_bf16_supported": lambda *args, **kwargs: True,
            "get_device_properties": lambda device=None: PROPERTIES,
        }
        both = answers | dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), nothing)
        both |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), number)
        stream = SimpleNamespace(is_capturing=lambda: False, synchronize=nothing, wait_stream=nothing)
        both |= {"max_memory_reserved": number, "current_stream": lambda device=None: stream}
        self._put(
            torch.cuda,
            current_device=lambda: self.current,
            set_device=self.set_device,
            _exchange_device=self.set_device,
            _maybe_exchange_device=self.set_device,
            get_device_name=lambda device=None: PROPERTIES.name,
            get_device_capability=lambda device=None: (9, 0),
            mem_get_info=lambda device=None: (70 * GB, 80 * GB),
            _lazy_init=nothing,
            is_current_stream_capturing=lambda: False,
            init=nothing,
            manual_seed=nothing,
            manual_seed_all=nothing,
            get_rng_state=lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
            set_rng_state=lambda state, device="cuda": None,
            get_rng_state_all=lambda: [torch.zeros(16, dtype=torch.uint8)] * self.gpus,
            set_rng_state_all=nothing,
            **both,
        )
        names = ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all", "manual_seed_all")
        self._put(torch.cuda.random, **{name: getattr(torch.cuda, name) for name in names})
        self._put(
            torch.accelerator,
            current_accelerator=lambda check_available=False: torch.device("cuda"),
            current_device_index=lambda: self.current,
            current_device_idx=lambda: self.current,
            set_device_index=self.set_device,
            set_device_idx=self.set_device,
            **both,
        )
        self._install_processes()
        self._install_models()
        forget_answers()
        return self

    def _put(self, owner: Any, **values: Any) -> None:
        for name, value in values.items():
            if hasattr(owner, name):
                self._undo.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)

    def _install_processes(self) -> None:
        def group(*args: Any, _real: Any = dist.init_process_group, **kwargs: Any) -> None:
            backend = args[0] if args else kwargs.get("backend")
            self.note("group", backend)
            kwargs |= {"backend": "gloo"}
            _real(*args[1:], **{key: value for key, value in kwargs.items() if key != "device_id"})

        def barrier(*args: Any, _real: Any = dist.barrier, device_ids: Any = None, **kwargs: Any) -> Any:
            self.note("collective", "barrier", [self.current] if device_ids is None else list(device_ids))
            return _real(*args, **kwargs)

        self._put(dist, init_process_group=group, barrier=barrier, is_nccl_available=lambda: True)
        for name in _TENSORS:
            self._put(dist, **{name: self._of_tensors(name, getattr(dist, name))})
        for name in _OBJECTS:
            self._put(dist, **{name: self._of_objects(name, getattr(dist, name))})

    def _of_tensors(self, name: str, real: Any) -> Any:
        @functools.wraps(real)
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
            for tensor in tensors:
                if home(tensor) is None:
                    raise RuntimeError(f"{name}: No backend type associated with device type cpu")
                if home(tensor).index != self.current:
                    raise RuntimeError(f"{name}: a tensor of {home(tensor)}, while {self.current} is current")
            self.note("collective", name, list(tensors[-1].shape), str(tensors[-1].dtype))
            return real(*args, **kwargs)

        return collective

    def _of_objects(self, name: str, real: Any) -> Any:
        @functools.wraps(real)
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensors = sum(isinstance(value, Tensor) for value in tree_iter((args, kwargs)))
            self.note("collective", name, self.current, tensors)
            return real(*args, **kwargs)

        return collective

    def _install_models(self) -> None:
        wrapper, fake = nn.parallel.DistributedDataParallel, self
        make, run, make_parameter = wrapper.__init__, wrapper.forward, nn.Parameter.__new__

        def ddp(model: Any, module: nn.Module, device_ids: Any = (), output_device: Any = None, **kwargs: Any) -> None:
            fake.note("ddp", [device if isinstance(device, int) else device.index for device in device_ids or ()])
            make(model, module, **kwargs)

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [value.detach().clone() for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
            content = b"".join(put(value.double(), None).numpy().tobytes() for value in tensors)
            reduces = model.require_backward_grad_sync and torch.is_grad_enabled()
            fake.note("forward", reduces, hashlib.sha256(content).hexdigest()[:12])
            return run(model, *args, **kwargs)

        def data_parallel(*args: Any, **kwargs: Any) -> None:
            fake.note("data_parallel")
            raise RuntimeError("a model was wrapped in nn.DataParallel")

        def parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            made = make_parameter(cls, data, requires_grad)
            return made if data is None or made.is_meta else put(made, home(data))

        def load(*args: Any, map_location: Any = None, _real: Any = torch.load, **kwargs: Any) -> Any:
            target = self._gpu(map_location) if isinstance(map_location, str | torch.device) else None
            found = _real(*args, map_location=map_location if target is None else "cpu", **kwargs)
            for value in tree_iter(found):
                if target is not None and isinstance(value, Tensor):
                    self.note("to", put(value, target).fake_home.index)
            return found

        self._put(torch, load=load)
        self._put(wrapper, __init__=ddp, forward=forward)
        self._put(nn.DataParallel, __init__=data_parallel)
        self._put(nn.Parameter, __new__=staticmethod(parameter))

    def uninstall(self) -> None:
        while self._undo:
            owner, name, value = self._undo.pop()
            setattr(owner, name, staticmethod(value) if name == "__new__" else value)
        forget_answers()


def forget_answers() -> None:
    """What transformers and accelerate remember of the machine."""
    from transformers.utils import import_utils

    for value in vars(import_utils).values():
        if "cuda" in getattr(value, "__name__", "") or "_gpu_" in getattr(value, "__name__", ""):
            getattr(value, "cache_clear", lambda: None)()
    import_utils.is_torch_accelerator_available.cache_clear()


def watch(fake: FakeCuda, folder: Path) -> None:
    """Notes what this process makes, writes, moves or deletes under a folder from now on."""
    kinds = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in kinds) and str(path := arguments[kinds.get(event, 0)]).startswith(str(folder)):
            fake.note("wrote", event, str(Path(str(path)).relative_to(folder)))

    sys.addaudithook(hook)


def main(gpus: int, record: Path, script: Path, *arguments: str) -> None:
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a mode is one thread's
    for library in ("torch._dynamo", "transformers.modeling_utils", "transformers.trainer", "peft", "blur_trainer"):
        importlib.import_module(library)  # as on a machine without a GPU: this torch is built for none
    fake = FakeCuda(gpus).install()
    if "--output_dir" in arguments:
        watch(fake, Path(arguments[arguments.index("--output_dir") + 1]))
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    try:
        with fake:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        (record / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(fake.events))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
