"""A digest of a saved model's weights: the same weights have the same one, however they are spread over files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from blur_trainer.models.checkpoint_tensors import check_adapter, is_adapter, local_folder


def weights_digest(name: str, **hub: Any) -> str:
    """
    SHA-256 of all tensors of a model, in the order of their names: name, dtype, shape, and bytes of each.

    Of an adapter: of its own tensors and of the name of its base, whose weights are not read. One tensor at a time is
    in memory.

    Args:
        name: a folder, or a name on the Hub.
        hub: `revision` and the like.

    Raises:
        `FileNotFoundError`: there are no safetensors weights.
    """
    folder = local_folder(name, **hub)
    digest = hashlib.sha256()
    if is_adapter(folder):
        check_adapter(folder)
        base = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
        digest.update(f"adapter of {base}\n".encode())
    homes: dict[str, Path] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            homes |= {f"{path.parent.relative_to(folder)}/{key}": path for key in file.keys()}  # noqa: SIM118
    for key, path in sorted(homes.items()):
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key.split("/", 1)[1])
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads, not those of an earlier save beside them."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if is_adapter(folder):
        found = [folder / ADAPTER_SAFE_WEIGHTS_NAME]
    elif (folder / SAFE_WEIGHTS_NAME).exists():
        found = [folder / SAFE_WEIGHTS_NAME]
    elif index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found = [folder / each for each in sorted(names)]
    else:
        found = []
    found += sorted(folder.glob("assistant/*.safetensors"))  # of a logit-difference model
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} has no safetensors weights: save the model by `save_pretrained`.")
    return found
