"""Reads rows of any kind into one of the formats that the trainers take, and says in one line what was recognized."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, IterableDataset

from blur_trainer.data.columns import find_format
from blur_trainer.data.origins import open_source
from blur_trainer.data.recognized import BESIDE, override, recognize
from blur_trainer.data.row_maker import RowMaker, number_of
from blur_trainer.data.sources import to_dataset
from blur_trainer.data.tables import Table

_NAMED = 5  # places or columns in a message


@dataclass(frozen=True)
class Reading:
    """
    Rows that were read.

    Args:
        dataset: for a trainer or an evaluation, with the columns of one format.
        said: one line for the user: what was read, which column is what, and what was left out.
        digest: of the rows in their order, 16 hexadecimal digits; the same for the same rows in another kind of file.
    """

    dataset: Dataset
    said: str
    digest: str

    def only(self, kept: Sequence[int], why: str) -> "Reading":
        """The rows at these places. `why` says what became of the others. Raises `ValueError` if none is left."""
        left = len(self.dataset) - len(kept)
        if not left:
            return self
        said = f"{self.said}; left out: {number_of(left, 'row')} {why}"
        if not kept:
            raise ValueError(f"No row is left. {said}.")
        digest = xxhash.xxh3_64(f"{self.digest} {list(kept)}".encode()).hexdigest()
        return Reading(self.dataset.select(kept), said, digest)


def read_rows(
    source: str | Path | Dataset | IterableDataset | Mapping[str, Any] | list[dict[str, Any]],
    *,
    role: str,
    has_template: bool,
    columns: str | Mapping[str, str] | None = None,
    limit: int | None = None,
    drop_empty: bool = False,
    config: str | None = None,
    split: str | None = None,
    token: str | bool | None = None,
) -> Reading:
    """
    Read data of one's own for unlearning or for its evaluation.

    Files: .csv, .tsv (text in every cell, "007" stays "007"), .json, .jsonl, .parquet, .txt (one text), each also as
    .gz, in UTF-8; a folder of such files of one kind, or one that `save_to_disk` made. Names of columns are recognized
    in any case, with blanks around:

    | columns | are read as |
    |---|---|
    | `question`, `query`, `instruction`, `problem` or `q`, and an answer | question and answer |
    | `prompt` or `input` (`source`, `user`, `human` with `target`, `assistant`), and an answer | prompt and answer |
    | answers: `answer`, `answers`, `response`, `completion`, `output`, `target`, `reply`, `a` | the first of several |
    | `input` beside `instruction` (Alpaca), `context`, `passage` | after the prompt; before a `question` (SQuAD) |
    | `system`, `system_prompt` | the system message |
    | `messages`, `conversations` (ShareGPT), `conversation`, `dialog` | one row for each answer in them |
    | `text`, `content`, `body`, `document`, `passage`, `article` | a text |
    | `input_ids` (`labels`, ...) | tokens, as they are |
    | `refusal`, `alternative`, `tools`, `chat_template_kwargs`, `forget_level` | go along |

    If the model has a chat template, questions and prompts are asked through it: the dataset has `question` and
    `answer`, which are rendered as the messages of a user and an assistant (with a `system` column: `prompt` and
    `completion` as messages). Prompts that are all written in a template already (`<|user|>`, `[INST]`, a last line
    `Answer:`) stay as they are. Without a chat template, questions are asked through `qa_template`, and a prompt stays
    as it is, with a space before its answer if there is none (columns named `prompt` and `completion` get none, as in
    TRL).

    Columns that are not recognized are left out and named. A dataset that could be read in two ways is an error, and so
    is multiple choice, whose answer may be a number. Rows without an answer are an error; repeated rows are counted.
    Messages after the last answer of a conversation are left out.

    Differs from TRL, where strings in `prompt` and `completion` are never asked through the chat template, so that a
    chat model is trained on text that nobody asks it.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`] or `list[dict]`):
            A file, a folder, `"-"` for standard input (JSON lines, CSV or text), the name of a dataset on the Hub, or
            rows in memory.
        role (`str`):
            What the rows are for (`"forget"`, `"retain"`). Messages name it, and the option `--{role}_columns`.
        has_template (`bool`):
            Whether the tokenizer has a chat template.
        columns (`str` or `dict`, *optional*):
            Which column is what, instead of the names above: `"prompt=frage,completion=antwort"`, `"text=inhalt"`.
            Parts are those of the table.
        limit (`int`, *optional*):
            Read the first rows only.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Leave out rows without a question, an answer or a text, instead of raising an error.
        config, split, token (*optional*):
            Of a dataset on the Hub. `split` also picks a file of a folder, or a list in a JSON file.

    Returns:
        `Reading`.

    Raises:
        `ValueError` or `TypeError`: what cannot be read, or could be meant in two ways; the message proposes an option
        or a remedy. `ConnectionError`: the Hub does not answer, or has no such dataset.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}: it must be at least 1, or None for all rows.")
    table = open_source(source, role, config, split, token, limit)
    if columns:
        parts = override(columns, table.columns, role, table.name)
    else:
        parts = recognize(table.columns, table.rows, role, table.name)
    maker = RowMaker(parts, table.rows, role, has_template, named=bool(columns))
    made = [row for raw, place in zip(table.rows, table.places, strict=True) for row in maker.make(raw, place)]
    missing = _missing(maker, table, drop_empty, made)
    changed = maker.finish(made)
    notes = [*table.notes, _mapping(maker, table.columns), maker.how_asked(), *changed, *_repeated(made), *missing]
    unread = [f"`{column}`" for column in table.columns if column not in _read_columns(maker)]
    notes += [f"not read: {_some(unread)}"] if unread else []
    dataset = to_dataset(made, find_format(made[0], role), role, has_template=has_template)
    said = [number_of(len(table.rows), "row"), *filter(None, notes)]
    return Reading(dataset, f"{table.name}: {'; '.join(said)}", _digest(made))


def _missing(maker: RowMaker, table: Table, drop_empty: bool, made: list[dict[str, Any]]) -> list[str]:
    """What is said of rows that lack something. Without `drop_empty` they are an error."""
    said = []
    for lacks, places in maker.missing.items():
        short = [place.removeprefix(f"{table.name}, ") for place in places]
        said.append(f"{number_of(len(places), 'row')} without {lacks} ({_some(short)})")
    if said and not (drop_empty and made):
        leave = ", or leave them out with `drop_empty` (`--drop_empty true`)" if made else ""
        raise ValueError(f"{table.name} has {' and '.join(said)}: fill them{leave}.")
    return [f"left out: {text}" for text in said]


def _read_columns(maker: RowMaker) -> list[str]:
    along = set(BESIDE) - set(maker.beside)
    return [column for part, column in maker.parts.items() if part not in along]


def _mapping(maker: RowMaker, columns: Sequence[str]) -> str:
    """For example "`instruction` + `input` -> question, `output` -> answer"."""
    parts = maker.parts
    if maker.style == "input_ids":
        return ""
    if maker.style == "text":
        return f"`{parts['text']}` as plain text" if len(columns) > 1 else "plain text"
    order = ("context", maker.ask) if maker.context_first else (maker.ask, "context")
    asks = [parts[part] for part in ("system", *order, "messages") if part in parts]
    into = {"conversation": "prompt", "prompt-completion": "prompt", "question-answer": "question"}
    into["messages"] = "messages" if maker.has_template else "question and answer"
    said = f"{' + '.join(f'`{column}`' for column in asks)} -> {into[maker.style]}"
    if "completion" in parts:
        said += f", `{parts['completion']}` -> {'answer' if maker.style == 'question-answer' else 'completion'}"
    beside = [f"`{parts[part]}`" for part in maker.beside]
    return said + (f", with {', '.join(beside)}" if beside else "")


def _repeated(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    times = Counter(map(_written, rows))
    repeated = len(rows) - len(times)
    return [f"repeated: {number_of(repeated, 'example')}"] if repeated else []


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(f"{_written(row)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _written(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


__all__ = ["Reading", "read_rows"]
