"""Reads the tensors of a safetensors checkpoint (one file or shards) one by one, without building the model."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from blur_trainer.file_names import file_name

# files that `from_pretrained` of model and tokenizer reads beside the weights
BESIDE = [CONFIG_NAME, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*"]
BESIDE += ["merges.txt", "*.model", "*.tiktoken", "chat_template*"]


def local_folder(name: str, **hub: Any) -> Path:
    """Returns the folder, or downloads safetensors, configuration and tokenizer of that hub id."""
    if Path(name).is_dir():
        return Path(name)
    try:
        patterns = [*BESIDE, "*.safetensors", SAFE_WEIGHTS_INDEX_NAME, ADAPTER_CONFIG_NAME]
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is no local folder, and no hub repository that can be read (a gated one: ask for access on its "
            f"page, then `hf auth login`). {error}"
        ) from error


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_NAME).exists()


def check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER_SAFE_WEIGHTS_NAME).exists():
        raise FileNotFoundError(f"{str(folder)!r} has an adapter's configuration but no {ADAPTER_SAFE_WEIGHTS_NAME}.")


class CheckpointTensors:
    """
    Name -> file of every tensor of a checkpoint.

    Raises:
        `FileNotFoundError`: the folder has no safetensors weights, or not all that its index names.
        `ValueError`: its weights are quantized, or its index names files outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, index = folder, folder / SAFE_WEIGHTS_INDEX_NAME
        if not (folder / CONFIG_NAME).exists():
            raise FileNotFoundError(f"{str(folder)!r} is no model: it has no {CONFIG_NAME}.")
        if json.loads((folder / CONFIG_NAME).read_text()).get("quantization_config"):
            raise ValueError(f"The weights in {str(folder)!r} are quantized: give the model in its own precision.")
        if (folder / SAFE_WEIGHTS_NAME).exists():
            with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        elif index.exists():
            self.files = _weight_map(index)
        else:
            found = sorted(path.name for path in folder.glob("*.bin"))[:3]
            raise FileNotFoundError(
                f"{str(folder)!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
                + (f", only {', '.join(found)}: load it and save it anew with `save_pretrained`." if found else ".")
            )
        missing = sorted(name for name in self.shards if not (folder / name).exists())
        if missing:
            raise FileNotFoundError(f"{str(folder)!r} misses {', '.join(missing[:3])}, which its index names.")

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.files.values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor. Reads no weights."""
        found: dict[str, tuple[int, ...]] = {}
        for shard in self.shards:
            with safe_open(self.folder / shard, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        absent = sorted(self.files.keys() - found.keys())
        if absent:
            raise FileNotFoundError(f"{str(self.folder)!r}: {absent[0]!r} is in the index but in no shard.")
        return found

    def get(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def vocabulary(self) -> Any:
        """Token -> id of the fast tokenizer in the folder. None if there is no such tokenizer."""
        path = self.folder / "tokenizer.json"
        return json.loads(path.read_text())["model"].get("vocab") if path.exists() else None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index. Other paths are refused, because files of these names are written too."""
    content = json.loads(index.read_text(encoding="utf-8"))
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{str(index)!r} has no `weight_map` of tensors and files: it is no index of a model.")
    for shard in set(map(str, named.values())):
        file_name(shard, f"In {str(index)!r}: the file")
        if not shard.endswith(".safetensors"):
            raise ValueError(f"In {str(index)!r}: the file {shard!r} is no safetensors: save the model anew.")
    return {tensor: str(shard) for tensor, shard in named.items()}
