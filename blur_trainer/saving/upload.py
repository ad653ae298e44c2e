"""What may be uploaded: an allow-list, so that no text to be forgotten and no target goes along.

`output_dir` also holds `metrics.json` and `report.html` with prompts and answers, the reference's log-probabilities,
models that a benchmark compares with, and whatever the user keeps there. What is not named here stays.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from blur_trainer.file_names import file_name
from blur_trainer.saving.manifest import MANIFEST_NAME
from blur_trainer.saving.output_dir import ASSISTANT

_ADAPTER = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
_ALONE = (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *_ADAPTER)
CARD = "README.md"
REPORT = ("metrics.json", "report.html")
#: of a run on one's own data: numbers, and sentences of numbers
VERDICT = "verdict.json"


def model_files(folder: Path, adapters: Iterable[str] = ()) -> list[str]:
    """The files of a saved model in `folder`: weights, configuration, and the code that it names.

    Args:
        folder: what `save_model` wrote, with whatever else is there.
        adapters: names of adapters that are in use; PEFT keeps all but `default` in folders of their own.
    """
    names = [*_ALONE, *_shards(folder), *_code(folder)]
    parents = [Path(ASSISTANT).parent, *(Path(file_name(name, "The adapter's name")) for name in adapters)]
    names += [str(parent / name) for parent in parents for name in _ADAPTER]
    return [name for name in dict.fromkeys(names) if (folder / name).is_file()]


def has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(".safetensors") for name in names)


def gather_checkpoint(folder: Path, into: Path) -> None:
    """Puts a complete checkpoint into a folder for an upload: the files that its manifest lists, and their list.

    The manifest's record of the run stays, because a digest of the forget set lets one test a guess of what is in it,
    and so does `training_args.bin`, which names folders of this machine. Resuming needs neither.
    """
    listed: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"] or {}
    listed.pop(TRAINING_ARGS_NAME, None)
    gather(folder, listed, into)
    (into / MANIFEST_NAME).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")


def figures(folder: Path) -> list[str]:
    """The figures of the report. They show numbers only."""
    from blur_trainer.report.figures import NAMES  # matplotlib is slow to import

    names = [f"figures/{name}.png" for name in NAMES]
    return [name for name in names if (folder / name).is_file()]


def verdict(folder: Path) -> list[str]:
    """The verdict, if there is one."""
    return [VERDICT] if (folder / VERDICT).is_file() else []


def gather(source: Path, names: Iterable[str], into: Path) -> None:
    """Puts files of `source` into a folder for an upload: as hard links, which cost nothing and outlive the source.

    An upload may still run when the next checkpoint replaces this one.
    """
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(source / name), into / name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / name, into / name)


def _shards(folder: Path) -> list[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    names: set[Any] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(file_name(name, f"In {str(index)!r}: the shard") for name in names)


def _code(folder: Path) -> Iterator[str]:
    """The modules that `auto_map` of the configuration names, and those that they import from beside them."""
    config = folder / CONFIG_NAME
    named = json.loads(config.read_text(encoding="utf-8")).get("auto_map") or {} if config.is_file() else {}
    for reference in named.values():
        for one in reference if isinstance(reference, list) else [reference]:
            module = folder / f"{file_name(str(one).split('--')[-1].split('.')[0], 'The module')}.py"
            if module.is_file():
                yield module.name
                yield from (Path(path).name for path in get_relative_import_files(module))
