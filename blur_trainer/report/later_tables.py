"""Tables that come after a run's numbers: into its `metrics.json`, its report, and its model card."""

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


def add_tables(folder: str | os.PathLike[str], tables: Tables) -> None:
    """
    Adds tables to what a run has written. One that has the title of another takes its place.

    Args:
        folder: with `metrics.json`, which gets the tables. Report and card are those of all tables then. A card that
            somebody else wrote stays as it is.
        tables: each with `title`, `said` (sentences), `heads` and `rows` of texts.

    Raises:
        `FileNotFoundError`: there is no `metrics.json`.
    """
    path = Path(folder) / "metrics.json"
    content = load(path)
    if content is None:
        raise FileNotFoundError(f"{str(folder)!r} has no metrics.json to add tables to: pass the folder of a run.")
    known = {table["title"]: table for table in [*(content.get("tables") or []), *tables]}
    content["tables"] = list(known.values())
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    card = Path(folder) / "README.md"
    if card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace"):
        put_tables(card, content["tables"])
    write_report(folder)


def put_tables(card: Path, tables: Tables) -> None:
    """Writes the tables into a card: in place of those that are marked there, else before its limits or at its end."""
    text, found = card.read_text(encoding="utf-8"), card_tables(tables).rstrip() + "\n"
    if _PLACE.search(text):
        text = _PLACE.sub(lambda _: found, text, count=1)
    else:
        before, limits, after = text.partition(_LIMITS)
        text = f"{before.rstrip()}\n\n{found}{limits}{after}"
    atomic_write(card, lambda partial: partial.write_text(text, encoding="utf-8"))
