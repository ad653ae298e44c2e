"""Which model a logit-difference model is made of: recorded when it is saved, checked when it is loaded.

The record of a folder is a digest, of a hub id the commit. It also tells the two apart: what was recorded as a folder
is never looked for on the Hub. A relative folder is one beside the configuration, whatever the working directory.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from blur_trainer.file_names import file_name

logger = logging.getLogger(__name__)
Origin = dict[str, str | None]  # {"folder": digest} or {"hub": commit}
_SAMPLE = 4096  # bytes read at the beginning, in the middle and at the end of each tensor


class Place(NamedTuple):
    """What `from_pretrained` is given."""

    name: str
    revision: str | None


def record(name: str, revision: str | None = None, cache_dir: str | None = None) -> tuple[str, Origin]:
    """
    The name as it is to be saved (of a folder its absolute path) and what it stands for now.

    Args:
        name: folder or hub id of a model.
        revision: what was loaded of the hub id; `None`: not known, and no commit is recorded.
        cache_dir: where it was loaded to.
    """
    if Path(name).is_dir() or not _is_repo_id(name):
        return str(Path(name).absolute()), {"folder": weights_digest(Path(name))}
    cached = None if revision is None else try_to_load_from_cache(name, CONFIG_NAME, cache_dir, revision)
    return name, {"hub": Path(cached).parent.name if isinstance(cached, str) else None}


def find(name: str, origin: Origin | None, beside: Path | None, what: str) -> Place:
    """
    Where a recorded model is.

    Args:
        name, origin: as recorded; older configurations have no origin.
        beside: the folder of the configuration, if it is a local one.
        what: `target` or `assistant`, for errors.

    Raises:
        `FileNotFoundError`: the folder is not there.
        `ValueError`: it is another model than the recorded one, or the configuration's own folder.
    """
    if origin is not None and "hub" in origin:
        return _of_hub(name, origin["hub"], what)
    folder = Path(name) if Path(name).is_absolute() or beside is None else beside / name
    if not folder.is_absolute() or not folder.is_dir():
        raise FileNotFoundError(
            f"{what} {name!r}: there is no folder {str(folder)!r}. It is not looked for elsewhere, nor on the Hub. Put "
            f"it there, or pass `{what}=`, the loaded model, to `LogitDifferenceModel.from_pretrained`."
        )
    if beside is not None and folder.samefile(beside):
        raise ValueError(f"{what} {name!r} is the folder of the configuration itself: pass `{what}=`.")
    expected = (origin or {}).get("folder")
    if expected is None:
        logger.warning("No digest of the %s is recorded: %s is taken on trust. Save the model anew.", what, folder)
    elif weights_digest(folder) != expected:
        raise ValueError(
            f"{what} {str(folder)!r} is not the model that was there when this one was saved: its weights or its "
            f"configuration have changed. Put that model back, or, if you want this one, pass `{what}=` to "
            "`LogitDifferenceModel.from_pretrained`."
        )
    return Place(str(folder), None)


def weights_digest(folder: Path) -> str | None:
    """Digest of configuration, names, shapes and samples of all tensors. `None` where there are no safetensors.

    Another model of the same shapes has another digest. Reads a few kB per tensor, not the whole.
    """
    digest = hashlib.sha256()
    files = _weight_files(folder)
    for file in files:
        for part in _samples(file):
            digest.update(part)
    config = folder / CONFIG_NAME
    digest.update(config.read_bytes() if config.is_file() else b"")
    return f"sha256:{digest.hexdigest()}" if files else None


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    shards: set[Any] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / file_name(shard, f"In {str(index)!r}: the shard") for shard in sorted(shards)]


def _samples(file: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and a few bytes of each tensor."""
    with file.open("rb") as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
        yield length + header
        start = 8 + len(header)
        for name, entry in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for place in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                opened.seek(start + place)
                yield opened.read(min(_SAMPLE, end - place))


def _of_hub(name: str, commit: str | None, what: str) -> Place:
    if Path(name).exists():
        raise ValueError(
            f"{what} {name!r} is recorded as a hub id, and a folder here has that name: move away from it."
        )
    if commit is None:
        logger.warning("No commit of the %s is recorded: the newest version of %s is loaded.", what, name)
    return Place(name, commit)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
