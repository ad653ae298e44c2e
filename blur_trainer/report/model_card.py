"""Writes the model card: what was forgotten, how, what was measured, and what the numbers do not show."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.card_metadata import card_metadata, is_hub_id, own_row
from blur_trainer.report.own_run import by_set, meanings, own_columns, verdict_texts
from blur_trainer.report.tables import cells, goal_of, heading, robustness_rows

logger = logging.getLogger(__name__)

MARKER = "<!-- Written by blur_trainer. Remove this line to keep your own changes from being overwritten. -->"
KEYS = frozenset(
    (
        *("title", "model_name", "method", "about", "ending", "base_model", "adapter", "library"),
        *("forget", "retain", "hyperparameters", "metrics", "row", "versions", "tags"),
        *("license", "license_name", "license_link", "language", "tasks", "datasets", "dataset", "dataset_args"),
    )
)
# an absolute path within a longer text: /a/b, ~/a, C:\a, file:///a, but not the slashes of a URL, a fraction, a hub id
PATH = re.compile(r"""(?<![\w:/.~<])(?:file://)?(?:~?/|[A-Za-z]:[\\/])[^\s"'`,;:()\[\]{}]+""")

ABOUT = "Unlearning here is a forget objective, a retain objective, and a rule that combines their two gradients."
NEARS = "→ closer to the value beside it, or else to the retrained model's, is better, "
# what is about an adapter in a card, which is not true of a merged model
NOTICE = re.compile(r"<!-- adapter -->.*?<!-- /adapter -->\n+", re.DOTALL)
BLOCK = re.compile(r"\A(\d*)([-+=.)])")  # at the beginning of a paragraph: a list, a rule


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
            * "model_name" (`str`): the model's name, where it is published; the heading if there is no title.
            * "base_model" (`str`): the model that was unlearned. A hub id goes into the metadata. Of a local path only
              the last part is shown.
            * "adapter" (`bool`): only an adapter was trained, and the base model is as it was. The card says so.
            * "library" (`str`): what loads the model, by default "transformers".
            * "forget", "retain" (`dict`): `{"name": str, "size": int}` of each set; both keys may be absent.
            * "hyperparameters" (`dict`): names and values, e.g. gamma, learning_rate.
            * "metrics" (`dict`): the content of metrics.json, of which "benchmark", "columns" and "rows" are shown, and
              "robustness" where this model's row is the one that was attacked, and "tables"; with a "verdict" this
              comes first, the numbers are grouped by set, and the settings say what was read. The finite numbers of
              this model's row become the metadata's `model-index`.
            * "row" (`str`): name of this model's row, by default the method.
            * "versions" (`dict`): package and version.
            * "tags" (`list` of `str`): further tags.
            * "license", "license_name", "license_link", "language": metadata, see [`base_metadata`].
            * "tasks", "datasets", "dataset", "dataset_args": metadata: the task, hub ids of the data and their names.

    Returns:
        The path of the README.md, even if it was not written.

    Raises:
        ValueError: if `info` has no method, has keys that are not listed above, or a value that no metadata may have.
    """
    if unknown := sorted(set(info) - KEYS):
        raise ValueError(f"`info` of a model card has unknown keys {unknown}. Accepted are {sorted(KEYS)}.")
    if not info.get("method"):
        raise ValueError('`info` of a model card must name its "method", e.g. {"method": "BLUR-NPO"}.')
    path = Path(output_dir) / "README.md"
    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        logger.warning("README.md was not written by blur_trainer and stays as it is. Remove it to get a model card.")
        return path
    text = str(_card(info))
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def merged_card(text: str) -> str:
    """The card of an adapter as that of the model into which the adapter was merged. Others are given back as is."""
    if MARKER not in text:
        return text
    card = ModelCard(NOTICE.sub("", text))
    data: Any = card.data
    data.library_name = "transformers"
    data.__dict__.pop("base_model_relation", None)
    return str(card)


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
    data = card_metadata(info, published)
    body = (
        _pages()
        .get_template("model_card.md")
        .render(
            marker=MARKER,
            title=info.get("title") or info.get("model_name") or f"{info['method']}{f' of {shown}' if shown else ''}",
            method=info["method"],
            about=info.get("about") or ABOUT,
            ending=info.get("ending"),
            adapter=info.get("adapter"),
            base=shown,
            published=published,
            sets=_sets(info, metrics),
            hyperparameters=info.get("hyperparameters") or {},
            benchmark=metrics.get("benchmark"),
            headings=[heading(column) for column in columns],
            rows=_rows(columns, rows),
            nears=NEARS if any(goal_of(column) == "near" for column in columns) else "",
            **_own(metrics),
            attacks=_rows(columns, _attacks(info, metrics)),
            versions=info.get("versions") or {},
            tables=metrics.get("tables") or [],
        )
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _pages() -> Environment:
    page = Environment(
        loader=PackageLoader("blur_trainer.report"),
        autoescape=False,  # the output is Markdown; the filters below escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(text=_escape, prose=_prose, code=_code)
    return page


def card_tables(tables: Sequence[Mapping[str, Any]]) -> str:
    """Further tables as a card has them, between marks by which they are found again. Paths are cut as there."""
    return _pages().get_template("tables.md").render(tables=without_paths(tables))


def _own(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a run on one's own data, and the verdict if there is one; nothing of others."""
    columns, rows, verdict = own_columns(metrics), metrics.get("rows") or [], metrics.get("verdict")
    return {
        "verdict": verdict_texts(verdict) if verdict else None,
        "names": [row["name"] for row in rows],
        "groups": by_set(columns, rows),
        "meanings": meanings(columns, rows),
    }


def _sets(info: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What is known of each set. A run on one's own data says what it read."""
    own = {role: info.get(role) or {} for role in ("forget", "retain")}
    data = (metrics.get("settings") or {}).get("data") if metrics.get("verdict") else None
    for role, said in (data or {}).items():
        own[role] = {"name": said, **{key: item for key, item in own.get(role, {}).items() if item is not None}}
    return list(own.items())


def _rows(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    texts = [cells(column, rows) for column in columns]
    return [[str(row["name"]), *(column[i] for column in texts)] for i, row in enumerate(rows)] if columns else []


def _attacks(info: Mapping[str, Any], metrics: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The results of attacks, if this model was attacked. The table may belong to several methods."""
    own = own_row(info, metrics)
    attacked = own is not None and own.get("kind") == "unlearned"
    return robustness_rows(metrics.get("robustness") or {}, metrics.get("rows") or []) if attacked else []


def _escape(item: Any) -> str:
    """Escapes plain text for Markdown, on one line: no HTML, no table cells, no accidental emphasis."""
    return _signs(_one_line(item))


def _prose(item: Any) -> str:
    """As `_escape`, for a paragraph of its own, in which what stands between backticks is code."""
    parts = _one_line(item).split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner
        parts = ["`".join(parts)]
    text = "".join(_code(part) if i % 2 else _signs(part) for i, part in enumerate(parts))
    return BLOCK.sub(r"\1\\\2", text)


def _one_line(item: Any) -> str:
    return " ".join(str(item).split())


def _signs(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)


def _code(item: Any) -> str:
    """Makes a code span for a table cell."""
    return "`" + (_one_line(item).replace("`", "'").replace("|", r"\|") or " ") + "`"
