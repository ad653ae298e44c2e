"""The metadata of a model card, which the Hub reads: base model, license, language, measured numbers."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from blur_trainer.report.tables import heading

_INHERITED = ("license", "license_name", "license_link", "language")
_TASK = "text-generation"


def is_hub_id(name: str) -> bool:
    """Whether `name` is "model" or "user/model", and not a folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def base_metadata(base: str | os.PathLike[str] | None, online: bool = False) -> dict[str, Any]:
    """
    License and language of a base model, from its card: of a folder the one in it, of a hub id the one in the cache.

    Args:
        base: folder or hub id.
        online: ask the Hub for a card that is not in the cache.

    Returns:
        Of `license`, `license_name`, `license_link`, `language` those that are stated.
    """
    if not base:
        return {}
    folder = Path(base)
    if folder.is_dir():
        found = _front_matter(folder / "README.md")
        return found or _config_license(folder / "config.json")
    if not is_hub_id(os.fspath(base)):
        return {}
    try:
        return _front_matter(Path(hf_hub_download(os.fspath(base), "README.md", local_files_only=not online)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):  # no card, no access, or no network
        return {}


def _front_matter(card: Path) -> dict[str, Any]:
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # somebody's card, which we only quote
        return {}
    found = {key: (metadata or {}).get(key) for key in _INHERITED}
    found = {key: value for key, value in found.items() if _is_text(value)}
    if "license" not in found:
        found = {key: value for key, value in found.items() if key == "language"}
    return found


def _config_license(config: Path) -> dict[str, Any]:
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("license") if config.is_file() else None
    except (OSError, ValueError, AttributeError):
        return {}
    return {"license": named} if _is_text(named) else {}


def _is_text(value: Any) -> bool:
    parts = value if isinstance(value, list) and value else [value]
    return all(isinstance(part, str) and part.strip() and part.isprintable() for part in parts)


def texts(name: str, given: Any) -> list[str]:
    """One text or several as a list. Raises `ValueError` for what is no plain text of one line."""
    listed = [] if given is None else list(given) if isinstance(given, (list, tuple, set)) else [given]
    for item in listed:
        if not _is_text(item) or isinstance(item, list):
            raise ValueError(f"`{name}` of a model card must be text of one line, or a list of such, got {given!r}.")
    return listed


def card_metadata(info: Mapping[str, Any], published: str | None) -> ModelCardData:
    """
    What stands between the `---` lines.

    Args:
        info: as of [`~blur_trainer.report.model_card.write_model_card`].
        published: the base model's hub id, if it has one.
    """
    tags = ["unlearning", "blur_trainer", _slug(info["method"]), *texts("tags", info.get("tags"))]
    tasks, results = texts("tasks", info.get("tasks")) or [_TASK], _results(info)
    fields: dict[str, Any] = {
        "base_model": published,
        "base_model_relation": "adapter" if published and info.get("adapter") else None,
        "datasets": _datasets(info) or None,
        "library_name": info.get("library") or "transformers",
        "pipeline_tag": tasks[0],
        "tags": list(dict.fromkeys(tags)),
        "model_name": _model_name(info) if results else None,
        "eval_results": results or None,
    }
    for key in _INHERITED:
        given = texts(key, info.get(key))
        fields[key] = given[0] if len(given) == 1 else given or None
    if fields["license"] is None:
        fields |= dict.fromkeys(("license_name", "license_link"))
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


def _datasets(info: Mapping[str, Any]) -> list[str]:
    named = texts("datasets", info.get("datasets"))
    for name in named:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"`datasets` (`dataset_tags`) of a model card takes hub ids, got {name!r}.") from error
    return named


def _model_name(info: Mapping[str, Any]) -> str:
    return " ".join(str(info.get("model_name") or info.get("title") or info["method"]).split())


def own_row(info: Mapping[str, Any], metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of this very model. A table may have other methods' too."""
    name = info.get("row") or info["method"]
    rows = [row for row in metrics.get("rows") or [] if row.get("kind") in ("unlearned", "baseline")]
    return next((row for row in rows if row["name"] == name), None)


def _results(info: Mapping[str, Any]) -> list[EvalResult]:
    """The finite numbers of this model's row, as the Hub's `model-index` has them."""
    metrics: Mapping[str, Any] = info.get("metrics") or {}
    row = own_row(info, metrics)
    if row is None:
        return []
    benchmark = " ".join(str(metrics.get("benchmark") or "benchmark").split())
    args = info.get("dataset_args")
    tasks, tags = texts("tasks", info.get("tasks")) or [_TASK], _datasets(info)
    names: Sequence[str] = texts("dataset", info.get("dataset")) or [benchmark]
    numbers = [(column, row.get("metrics", {}).get(column["name"])) for column in metrics.get("columns") or []]
    return [
        EvalResult(
            task_type=tasks[0],
            dataset_type=tags[0] if tags else _slug(benchmark),
            dataset_name=names[0],
            dataset_args=args if isinstance(args, dict) else {"args": args} if args else None,
            metric_type=_slug(column["name"], "_"),
            metric_name=heading({**column, "goal": None}),
            metric_value=number,
        )
        for column, number in numbers
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    ]


def _slug(text: str, keep: str = "") -> str:
    return re.sub(rf"[^a-z0-9.{keep}]+", "-", text.lower()).strip("-.") or "unlearned"
