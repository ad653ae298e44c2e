"""RMU's control vectors: one random direction per topic, equal on every process and device, saved in checkpoints."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blur_trainer.atomic_write import atomic_write

#: file name in a checkpoint
NAME = "control_vectors.safetensors"


def control_vector(topic: str, size: int, seed: int) -> Tensor:
    """
    `u / ||u||` with `u` uniform on `[0, 1)^size`, `(size,)` float32. It depends only on the arguments.

    All entries are positive, as in the WMDP authors' code (arXiv 2403.03218). There the vector is drawn on the GPU and
    not saved.
    """
    digest = hashlib.sha256(f"{seed}:{topic}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = torch.rand(size, generator=generator)
    return drawn / drawn.norm()


def save_vectors(folder: str | Path, topics: Sequence[str], vectors: Tensor) -> None:
    """Writes `vectors` `(topics, ..., H)` into `folder`, atomically."""
    names = {"topics": json.dumps(list(topics))}
    atomic_write(Path(folder) / NAME, lambda file: save_file({"vectors": vectors.cpu()}, file, metadata=names))


def load_vectors(folder: str | Path, topics: Sequence[str], size: int) -> Tensor:
    """Reads `(topics, ..., size)` float32. Raises `ValueError` if they are missing, or topics or hidden size differ."""
    path = Path(folder) / NAME
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is missing: a resumed RMU goes on towards the control vectors of its checkpoint. Was the "
            "checkpoint written with another forget objective?"
        )
    with safe_open(path, framework="pt") as file:
        saved = json.loads((file.metadata() or {}).get("topics", "[]"))
        vectors = file.get_tensor("vectors")
    if saved != list(topics):
        raise ValueError(
            f"{str(path)!r} has the topics {saved}, this training {list(topics)}: resume with the same topics in the "
            "same order, or start anew."
        )
    if (len(vectors), vectors.shape[-1]) != (len(topics), size):
        raise ValueError(
            f"{str(path)!r} has vectors of {vectors.shape[-1]} entries, the model a hidden size of {size}: resume with "
            "the model of the checkpoint."
        )
    return vectors
