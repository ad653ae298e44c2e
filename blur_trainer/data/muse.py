"""MUSE (machine unlearning six-way evaluation): its sets from the Hub or a local folder, in one schema.

The schema is one [`~datasets.DatasetDict`] whose keys are `{config}_{split}` of the Hub's sets:

| keys | columns |
|---|---|
| `raw_forget`, `raw_retain` (the Hub's `retain1`) | text |
| `verbmem_forget` | prompt, gt |
| `knowmem_forget_qa`, `knowmem_retain_qa`, and the same with `_icl` | question, answer |
| `privleak_forget`, `privleak_retain`, `privleak_holdout` | text |
| `scal_forget_1..4`, `sust_forget_1..4` (News only) | text |

Source: https://huggingface.co/datasets/muse-bench/MUSE-News and MUSE-Books (Shi et al., 2024, arXiv:2407.06460).
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, Value

from blur_trainer.data.files import checked_folder, checked_rows, find_file, from_hub, read_rows
from blur_trainer.data.subset import limit_documents
from blur_trainer.toy.muse import muse_corpora

__all__ = ["AUC_RETRAIN", "MUSE_MODELS", "MuseModels", "limit_documents", "load_muse", "muse_stages"]

COLUMNS = {
    "raw": ("text",),
    "verbmem": ("prompt", "gt"),
    "knowmem": ("question", "answer"),
    "privleak": ("text",),
    "scal": ("text",),
    "sust": ("text",),
}
_FOLDS = tuple(f"forget_{k}" for k in range(1, 5))
# What the Hub's sets hold: config -> splits; raw has `retain2` and `holdout` besides, which unlearning does not use.
HUB_SPLITS: dict[str, tuple[str, ...]] = {
    "raw": ("forget", "retain1"),
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"),
    "privleak": ("forget", "retain", "holdout"),
}
NEWS_SPLITS: dict[str, tuple[str, ...]] = {"scal": _FOLDS, "sust": _FOLDS}
REPOS = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
CORPORA = (*REPOS, "embedded")

REQUIRED = (
    "raw_forget",
    "verbmem_forget",
    "knowmem_forget_qa",
    "knowmem_retain_qa",
    "privleak_forget",
    "privleak_retain",
    "privleak_holdout",
)
OPTIONAL = (
    "raw_retain",
    "raw_hold",
    "verbmem_retain",
    "verbmem_hold",
    "knowmem_hold_qa",
    *(f"knowmem_{group}_qa_icl" for group in ("forget", "retain", "hold")),
    *(f"{config}_{fold}" for config in NEWS_SPLITS for fold in _FOLDS),
)


class MuseModels(NamedTuple):
    """Hub ids of a corpus: the model that knows all, the one retrained without forget, and their tokenizer (gated)."""

    target: str
    retrain: str
    tokenizer: str = "meta-llama/Llama-2-7b-hf"


MUSE_MODELS = {
    "news": MuseModels("muse-bench/MUSE-News_target", "muse-bench/MUSE-News_retrain"),
    "books": MuseModels("muse-bench/MUSE-Books_target", "muse-bench/MUSE-Books_retrain"),
}
AUC_RETRAIN = {"news": 0.4772, "books": 0.5393}
"""AUC of the lowest-40 % score on forget against holdout, of MUSE's retrained models: the zero of PrivLeak."""


def load_muse(
    corpus: str = "news", data_dir: str | Path | None = None, *, token: str | bool | None = None
) -> DatasetDict:
    """
    Load a MUSE corpus.

    Args:
        corpus (`str`, defaults to `"news"`):
            `"news"` or `"books"` from the Hub, or `"embedded"`: fictitious, no network
            ([`~blur_trainer.toy.muse.muse_corpora`]).
        data_dir (`str` or `Path`, *optional*):
            Read this folder instead of the Hub. A split is a file `knowmem_forget_qa.jsonl` or
            `knowmem/forget_qa.jsonl`; `.json` (a list of objects) and, for documents, `.txt` (one document) will do.
            Without raw retain documents the PrivLeak retain texts take their place, with a warning.
        token (`str` or `bool`, *optional*):
            For the Hub, where a set asks for one; by default the one that `hf auth login` stored.

    Returns:
        [`~datasets.DatasetDict`]: see the module. Documents without a word (MUSE-News has one) are left out.

    Raises:
        `ValueError`: unknown corpus; missing folder, split or column; empty or malformed file.
        `TypeError`: something that is not a string in a column.
        `ConnectionError`: the Hub did not deliver; the message says what to pass.
    """
    if corpus not in CORPORA:
        raise ValueError(f"corpus is {corpus!r}; it must be one of {list(CORPORA)}.")
    if corpus == "embedded":
        if data_dir is not None:
            raise ValueError(
                "corpus='embedded' is built in and reads no data_dir; with data_dir pass 'news' or 'books'."
            )
        return muse_corpora()
    return _from_hub(corpus, token) if data_dir is None else _from_folder(checked_folder(data_dir))


def _from_hub(corpus: str, token: str | bool | None) -> DatasetDict:
    repo = REPOS[corpus]
    data = DatasetDict()
    for config, splits in (HUB_SPLITS | (NEWS_SPLITS if corpus == "news" else {})).items():
        for split in splits:
            rows, where = from_hub(repo, config, split, token)
            data[f"{config}_{split}".replace("retain1", "retain")] = _checked(rows, config, where)
    return data


def _from_folder(folder: Path) -> DatasetDict:
    files = {key: _find(folder, key) for key in REQUIRED + OPTIONAL}
    missing = [key for key in REQUIRED if files[key] is None]
    if missing:
        tried = "; ".join(f"{key}: {', '.join(_names(key))}" for key in missing)
        raise ValueError(f"data_dir {str(folder)!r} has no file for {missing}. Tried: {tried}.")
    data = DatasetDict({key: _checked(read_rows(f), key.split("_")[0], str(f)) for key, f in files.items() if f})
    if "raw_retain" not in data:
        warnings.warn(
            f"{str(folder)!r} has no raw retain documents ({', '.join(_names('raw_retain'))}): the "
            f"{len(data['privleak_retain'])} texts of privleak_retain serve as retain documents.",
            stacklevel=3,
        )
        data["raw_retain"] = data["privleak_retain"]
    return data


def _names(key: str) -> list[str]:
    """The file names that may hold a split, relative to the folder."""
    config, split = key.split("_", 1)
    splits = [split, "retain1"] if key == "raw_retain" else [split]
    suffixes = (".jsonl", ".json", ".txt") if COLUMNS[config] == ("text",) else (".jsonl", ".json")
    return [f"{config}{separator}{name}{suffix}" for name in splits for separator in "_/" for suffix in suffixes]


def _find(folder: Path, key: str) -> Path | None:
    return find_file(folder, _names(key), key)


def _checked(rows: Iterable[Any], config: str, where: str) -> Dataset:
    """The columns of `config`, all strings; other columns are dropped, and so are documents without a word."""
    columns = COLUMNS[config]
    if columns == ("text",):
        rows = ({"text": row} if isinstance(row, str) else row for row in rows)
    table: dict[str, list[str]] = {column: [] for column in columns}
    for row in checked_rows(rows, columns, where):
        if config in ("raw", "scal", "sust") and not row["text"].strip():
            continue
        for column in columns:
            table[column].append(row[column])
    if not table[columns[0]]:
        raise ValueError(f"{where} has no rows; it must have at least one.")
    return Dataset.from_dict(table, features=Features({column: Value("string") for column in columns}))


def muse_stages(data: DatasetDict, protocol: str) -> list[tuple[str, Dataset]]:
    """
    The forget sets of MUSE's two protocols with several of them, in order, with a name each.

    `"sust"` (sustainability): disjoint sets, unlearned one after another. `"scal"` (scalability): sets of growing
    size, each unlearned from the target anew. MUSE has them for News, the embedded corpora have them too.
    """
    if protocol not in ("sust", "scal"):
        raise ValueError(f"protocol is {protocol!r}; it must be 'sust' or 'scal'.")
    stages = [(f"{protocol} {k}", f"{protocol}_forget_{k}") for k in (1, 2, 3, 4)]
    missing = [split for _, split in stages if split not in data]
    if missing:
        raise ValueError(
            f"the data has no splits {missing}: MUSE-News and the embedded corpora do, unless limited in documents."
        )
    return [(name, data[split]) for name, split in stages]
