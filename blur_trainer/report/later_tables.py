"""Tables that come after a run's numbers: into its model card, its `metrics.json` and its report."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.html import write_report
from blur_trainer.report.metrics_file import load
from blur_trainer.report.model_card import MARKER, card_tables

Tables = Sequence[Mapping[str, Any]]
_PLACE = re.compile(r"<!-- tables -->.*?<!-- /tables -->\n?", re.DOTALL)
_LIMITS = "\n## Limitations\n"


def add_tables(folder: str | os.PathLike[str], tables: Tables, any_card: bool = False) -> None:
    """
    Adds tables to a model's card, and to the numbers and the report of the run that made it, if they are there.

    A table that has the title of another takes its place. What else a card says stays.

    Args:
        folder: of the model.
        tables: each with `title`, `said` (sentences), `heads` and `rows` of texts.
        any_card: also into a card that somebody else wrote, or a new one.
    """
    path, card = Path(folder) / "metrics.json", Path(folder) / "README.md"
    content = load(path)
    shown = _joined((content or {}).get("tables") or [], tables)
    if any_card or (card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace")):
        _put(card, shown)
    if content is not None:
        text = json.dumps({**content, "tables": shown}, indent=2) + "\n"
        atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        write_report(folder)


def _joined(known: Tables, tables: Tables) -> list[Mapping[str, Any]]:
    return list({table["title"]: table for table in [*known, *tables]}.values())


def _put(card: Path, tables: Tables) -> None:
    """In place of the tables that are marked there, else before the limits, else at the end."""
    text, found = card.read_text(encoding="utf-8") if card.is_file() else "", card_tables(tables).rstrip() + "\n"
    if _PLACE.search(text):
        text = _PLACE.sub(lambda _: found, text, count=1)
    else:
        before, limits, after = text.partition(_LIMITS)
        text = f"{before.rstrip()}\n\n{found}{limits}{after}".lstrip()
    atomic_write(card, lambda partial: partial.write_text(text, encoding="utf-8"))
