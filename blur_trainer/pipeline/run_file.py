"""`run.yaml`: what a run was told and what it derived. `blur-trainer unlearn --config run.yaml` does the same again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from blur_trainer.atomic_write import atomic_write
from blur_trainer.credentials import without_tokens
from blur_trainer.pipeline.arguments import DERIVED
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.scripts.command_line import read_options

FILE = "run.yaml"
#: what a search has tried
TRIALS = "trials.json"
_LINE = "forget: forget.csv"
_HEAD = """# What this run was told, and under `derived` what followed from the model and the data.
# The same again, from the same folder: blur-trainer unlearn --config run.yaml --output_dir OTHER
"""
_HEAD_OF_SEQUENCE = """# What this sequence was told. Settings that followed from the data are in the run.yaml of each.
# One more: blur-trainer unlearn --config run.yaml --sequence ANOTHER_FILE
"""


def write_run(out: Path, prepared: Prepared) -> Path:
    """
    Writes `run.yaml` atomically, without access tokens. Data in memory is named in a comment, with its digest.

    Settings that a search has found are among the derived ones, so the same again needs no search.
    """
    found = prepared.script.optuna is not None and (out / TRIALS).is_file()
    left_out = {"resume_from_checkpoint"} | ({"optuna"} if found else set())
    options = {name: value for name, value in prepared.options.items() if name not in left_out}
    text = _HEAD + _dumped(without_tokens({name: value for name, value in options.items() if _is_plain(value)}))
    text += "".join(f"# {name}: {kind_of(value)}\n" for name, value in options.items() if not _is_plain(value))
    text += _dumped({DERIVED: without_tokens(prepared.settings)})
    text += "".join(f"# {role}: {reading.said}; digest {reading.digest}\n" for role, reading in prepared.sets.items())
    return _written(out, text)


def write_sequence(out: Path, options: Mapping[str, Any]) -> Path:
    """Writes the `run.yaml` of a sequence. The settings that follow from the data are in that of each request."""
    plain = {name: value for name, value in options.items() if _is_plain(value)}
    text = _HEAD_OF_SEQUENCE + _dumped(without_tokens(plain))
    return _written(
        out, text + "".join(f"# {name}: {kind_of(value)}\n" for name, value in options.items() if name not in plain)
    )


def _written(out: Path, text: str) -> Path:
    path = out / FILE
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def read_run(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file. Raises `ValueError` if it holds none."""
    found = read_options(path, _LINE)
    if not isinstance(found.get(DERIVED, {}), Mapping):
        raise ValueError(f"`{DERIVED}` in {path} holds no settings: leave it out, or write lines below it.")
    return found


def kind_of(value: Any) -> str:
    return f"a {type(value).__name__} in memory"


def _dumped(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_without_paths(values), sort_keys=False, allow_unicode=True) if values else ""


def _without_paths(value: Any) -> Any:
    """Paths as texts, which YAML has."""
    if isinstance(value, Mapping):
        return {name: _without_paths(each) for name, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def _is_plain(value: Any) -> bool:
    """Whether YAML can say it."""
    if isinstance(value, list | tuple):
        return all(isinstance(each, str | int | float) for each in value)
    return value is None or isinstance(value, str | int | float | bool | dict | Path)
