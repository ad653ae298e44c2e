"""General text from a file or from the Hub, to be retained beside the retain set."""

from pathlib import Path

from datasets import Dataset

from blur_trainer.data.files import checked_rows, from_hub
from blur_trainer.data.tables import ACCEPTED, KINDS, read_table, suffix_of


def general_text(
    source: str | Path,
    *,
    num: int | None = None,
    column: str = "text",
    config: str | None = None,
    split: str = "train",
    seed: int = 0,
    token: str | bool | None = None,
) -> Dataset:
    """
    General text, for a retain set beside the user's own. Training cuts it into pieces of `max_length`.

    Args:
        source (`str` or `Path`):
            A file (.txt: one text; .jsonl, .json, .csv, .tsv, .parquet: a text per row; each also as .gz), or a
            dataset's name on the Hub.
        num (`int`, *optional*):
            So many texts, drawn by `seed`. Default: all.
        column (`str`, defaults to `"text"`):
            The column with the texts.
        config, split, token:
            Of the dataset on the Hub, as of `datasets.load_dataset`.

    Returns:
        [`~datasets.Dataset`] with the column `text`, without texts that are blank.

    Raises:
        `ValueError`: another kind of file, no such column, no text, fewer than `num` texts. `TypeError`: a text that is
        no string. `ConnectionError`: the Hub does not answer, or has no such dataset.
    """
    path = Path(source)
    if path.is_file():
        rows, where = read_table(path).rows, str(path)
    elif suffix_of(path) in KINDS:
        raise ValueError(f"There is no file {str(source)!r}: give an existing file, or a dataset's name on the Hub.")
    else:
        rows, where = from_hub(str(source), config, split, token, hint=f"Give a file instead: {ACCEPTED}.")
    texts = [row[column] for row in checked_rows(map(dict, rows), [column], where) if row[column].strip()]
    if num is not None and not 1 <= num <= len(texts):
        raise ValueError(
            f"`num` is {num!r}, and {where} has {len(texts)} texts that are not blank: take at most these."
        )
    if not texts:
        raise ValueError(f"{where} has blank texts only: give one with text in the column {column!r}.")
    made = Dataset.from_dict({"text": texts})
    return made if num is None else made.shuffle(seed=seed).select(range(num))
