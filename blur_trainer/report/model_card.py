"""Writes the model card: what was forgotten, how, what was measured, and what the numbers do not show."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from blur_trainer.report.tables import cells, heading, robustness_rows

logger = logging.getLogger(__name__)

MARKER = "<!-- Written by blur_trainer. Remove this line to keep your own changes from being overwritten. -->"
KEYS = frozenset(
    {
        "title",
        "method",
        "about",
        "ending",
        "base_model",
        "forget",
        "retain",
        "hyperparameters",
        "metrics",
        "versions",
        "tags",
    }
)
# an absolute path within a longer text: /a/b, ~/a, C:\a, file:///a, but not the slashes of a URL, a fraction, a hub id
PATH = re.compile(r"""(?<![\w:/.~<])(?:file://)?(?:~?/|[A-Za-z]:[\\/])[^\s"'`,;:()\[\]{}]+""")


def write_model_card(output_dir: str | os.PathLike[str], info: Mapping[str, Any]) -> Path:
    """
    Writes `README.md`, a model card with Hugging Face metadata. Does not overwrite a card that somebody else wrote.

    Args:
        output_dir: folder of the saved model.
        info: the content. All keys are optional except "method".

            * "method" (`str`): the preset or combination, e.g. "BLUR-NPO".
            * "about" (`str`): what the method is, in a sentence or two, and how to use the model if that is unusual.
            * "ending" (`str`): how the training ended, if it did not run to its end, e.g. "Interrupted at step 3 of 8".
            * "title" (`str`): heading of the card, by default the method and the base model.
            * "base_model" (`str`): the model that was unlearned. A hub id goes into the metadata. Of a local path only
              the last part is shown.
            * "forget", "retain" (`dict`): `{"name": str, "size": int}` of each set; both keys may be absent.
            * "hyperparameters" (`dict`): names and values, e.g. gamma, learning_rate.
            * "metrics" (`dict`): the content of metrics.json, of which "benchmark", "columns" and "rows" are shown, and
              "robustness" where the method is that of the row which was attacked.
            * "versions" (`dict`): package and version.
            * "tags" (`list` of `str`): further tags.

    Returns:
        The path of the README.md, even if it was not written.

    Raises:
        ValueError: if `info` has no method or has keys that are not listed above.
    """
    if unknown := sorted(set(info) - KEYS):
        raise ValueError(f"`info` of a model card has unknown keys {unknown}. Accepted are {sorted(KEYS)}.")
    if not info.get("method"):
        raise ValueError('`info` of a model card must name its "method", e.g. {"method": "BLUR-NPO"}.')
    path = Path(output_dir) / "README.md"
    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        logger.warning("README.md was not written by blur_trainer and stays as it is. Remove it to get a model card.")
        return path
    path.write_text(str(_card(info)), encoding="utf-8")
    return path


def is_hub_id(name: str) -> bool:
    """Whether `name` is "model" or "user/model", and not a folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def without_paths(item: Any) -> Any:
    """`item` with every absolute path, at any depth, cut to its last part, because a card is read on other machines."""
    if isinstance(item, Mapping):
        return {without_paths(key): without_paths(value) for key, value in item.items()}
    if isinstance(item, (list, tuple, set)):
        return [without_paths(value) for value in item]
    if isinstance(item, os.PathLike):
        item = os.fspath(item)
    if not isinstance(item, str):
        return item
    if PurePosixPath(item).is_absolute() or PureWindowsPath(item).is_absolute():
        return _last_part(item)
    return PATH.sub(lambda match: _last_part(match.group()), item)


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or "…"  # it understands both kinds of slashes


def _card(info: Mapping[str, Any]) -> ModelCard:
    base = os.fspath(info["base_model"]) if info.get("base_model") else None
    published = base if base is not None and is_hub_id(base) else None
    info = without_paths(info)
    # a relative folder means nothing on other machines either
    shown = published or (_last_part(base) if base else None)
    metrics = info.get("metrics") or {}
    columns, rows = metrics.get("columns") or [], metrics.get("rows") or []
    data = ModelCardData(
        base_model=published,
        library_name="transformers",
        tags=list(dict.fromkeys(["unlearning", "blur_trainer", _tag(info["method"]), *(info.get("tags") or [])])),
    )
    page = Environment(
        loader=PackageLoader("blur_trainer.report"),
        autoescape=False,  # the output is Markdown; the filters below escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(text=_escape, code=_code)
    body = page.get_template("model_card.md").render(
        marker=MARKER,
        title=info.get("title") or f"{info['method']}{f' of {shown}' if shown else ''}",
        method=info["method"],
        about=info.get("about"),
        ending=info.get("ending"),
        base=shown,
        published=published,
        sets=[(role, info.get(role) or {}) for role in ("forget", "retain")],
        hyperparameters=info.get("hyperparameters") or {},
        benchmark=metrics.get("benchmark"),
        headings=[heading(column) for column in columns],
        rows=_rows(columns, rows),
        attacks=_rows(columns, _attacks(info["method"], metrics)),
        versions=info.get("versions") or {},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _rows(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    texts = [cells(column, rows) for column in columns]
    return [[str(row["name"]), *(column[i] for column in texts)] for i, row in enumerate(rows)] if columns else []


def _attacks(method: str, metrics: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The results of attacks, if this model was attacked. The table may belong to several methods."""
    rows = metrics.get("rows") or []
    ours = any(row.get("kind") == "unlearned" and row["name"] == method for row in rows)
    return robustness_rows(metrics.get("robustness") or {}, rows) if ours else []


def _tag(method: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", method.lower()).strip("-") or "unlearned"


def _escape(item: Any) -> str:
    """Escapes plain text for Markdown, on one line: no HTML, no table cells, no accidental emphasis."""
    text = " ".join(str(item).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def _code(item: Any) -> str:
    """Makes a code span for a table cell."""
    return "`" + (" ".join(str(item).split()).replace("`", "'").replace("|", r"\|") or " ") + "`"
