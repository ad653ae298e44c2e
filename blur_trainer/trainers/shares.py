"""Files in a checkpoint that hold tensors in the places of a gradient: one, or under sharding one per process."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_share(
    checkpoint: str | Path,
    name: str,
    tensors: Sequence[Tensor | None],
    sharded: bool,
    writes: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Called on every process. `sharded`: each one has its own share. `writes`: this process writes what all have."""
    if sharded or writes:
        held = {str(i): t.cpu().contiguous() for i, t in enumerate(tensors) if t is not None}
        save_file(held, _path(checkpoint, name, sharded), metadata={"parts": str(len(tensors)), **(metadata or {})})


def read_share(checkpoint: str | Path, name: str) -> tuple[list[Tensor | None], dict[str, str]]:
    """This process's share on the CPU, and the metadata. Raises `ValueError` if the file is not there."""
    whole = _path(checkpoint, name, sharded=False)
    path = there(whole if whole.exists() else _path(checkpoint, name, sharded=True))
    with safe_open(path, framework="pt") as file:
        held, metadata = set(file.keys()), file.metadata()
        places = [str(i) for i in range(int(metadata["parts"]))]
        # a copy: the file's own memory is not aligned, and inner products would round in another way
        return [file.get_tensor(i).clone() if i in held else None for i in places], metadata


def _path(checkpoint: str | Path, name: str, sharded: bool) -> Path:
    state = PartialState()
    process, processes = (state.process_index, state.num_processes) if sharded else (0, 1)
    return Path(checkpoint, f"{name}-{process:05}-of-{processes:05}.safetensors")


def there(path: Path) -> Path:
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is missing: this training resumes with it, on as many processes as before. Put it back, or "
            "start anew with another `output_dir`."
        )
    return path
