"""TOFU (a task of fictitious unlearning): its sets from the Hub or a local folder, in one schema.

The schema is one [`~datasets.DatasetDict`] for one of the three forget sets, here `forget10`:

| key | configuration on the Hub | columns |
|---|---|---|
| `forget` | `forget10` | question, answer |
| `retain` | `retain90` (`retain95` of `forget05`, `retain99` of `forget01`) | question, answer |
| `holdout` | `holdout10` | question, answer |
| `forget_perturbed` | `forget10_perturbed` | these two, and the four below |
| `retain_perturbed` | `retain_perturbed` | likewise |
| `real_authors_perturbed`, `world_facts_perturbed` | the same | question, answer, perturbed_answer |

`perturbed_answer` is a list of wrong answers. `paraphrased_answer` is one string, which the evaluation reads. The
lists `paraphrased_questions` and `paraphrased_answers` hold all paraphrases of the source; `paraphrased_question` is
the first one. If the source has no paraphrased questions, both columns of them are missing.

Source: https://huggingface.co/datasets/locuslab/TOFU (Maini et al., 2024, arXiv:2401.06121).
"""

import random
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, List, Value

from blur_trainer.data.files import checked_folder, checked_rows, find_file, from_hub, read_rows
from blur_trainer.data.subset import limit_rows
from blur_trainer.toy.tofu import tofu_corpora, tofu_training_rows

__all__ = ["TOFU_MODELS", "TOFU_SPLITS", "TofuModels", "limit_rows", "load_tofu", "tofu_corpora", "tofu_training_rows"]

REPO = "locuslab/TOFU"
CORPORA = ("tofu", "embedded")
TOFU_SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
"""Forget set -> its retain set; also the names of the models that never saw the forget set."""

QA = ("question", "answer")
PARAPHRASED = ("forget_perturbed", "retain_perturbed")
CHOICES = ("real_authors_perturbed", "world_facts_perturbed")
NUM_WRONG = {key: 5 if key in PARAPHRASED else 3 for key in PARAPHRASED + CHOICES}  # as many as TOFU has


class TofuModels(NamedTuple):
    """Hub ids: the model that knows all of TOFU, and those trained without a forget set."""

    full: str
    retain99: str
    retain95: str
    retain90: str


TOFU_MODELS = {
    base: TofuModels(*(f"open-unlearning/tofu_{base}_{kind}" for kind in TofuModels._fields))
    for base in ("Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct", "Llama-2-7b-chat-hf")
}
"""By base model; `getattr(models, TOFU_SPLITS[split])` is the retain model of a forget set."""


def load_tofu(
    corpus: str = "tofu",
    split: str = "forget10",
    data_dir: str | Path | None = None,
    *,
    token: str | bool | None = None,
) -> DatasetDict:
    """
    Load one of TOFU's forget sets and all that belongs to it.

    Args:
        corpus (`str`, defaults to `"tofu"`):
            `"tofu"` from the Hub, or `"embedded"`: fictitious, no network
            ([`~blur_trainer.toy.tofu.tofu_corpora`]).
        split (`str`, defaults to `"forget10"`):
            `"forget01"`, `"forget05"` or `"forget10"`.
        data_dir (`str` or `Path`, *optional*):
            Read this folder instead of the Hub. A set is a file `forget10.jsonl` or `forget10/train.jsonl`, with the
            Hub's name; `.json` (a list of objects) will do. A `*_perturbed` set may also be columns of the set itself.
            If there are no wrong answers, other answers of the file are used, with a warning. `holdout` may be absent.
        token (`str` or `bool`, *optional*):
            For the Hub. Default: the token that `hf auth login` stored.

    Returns:
        [`~datasets.DatasetDict`]: see the module.

    Raises:
        `ValueError`: unknown corpus or split; missing folder, set or column; empty or malformed file.
        `TypeError`: something that is not a string, or a list of them, in a column.
        `ConnectionError`: the Hub did not deliver; the message says what to pass.
    """
    if corpus not in CORPORA:
        raise ValueError(f"corpus is {corpus!r}; it must be one of {list(CORPORA)}.")
    if split not in TOFU_SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {list(TOFU_SPLITS)}.")
    if corpus == "embedded":
        if data_dir is not None:
            raise ValueError("corpus='embedded' is built in and reads no data_dir; with data_dir pass 'tofu'.")
        return tofu_corpora(split=split)
    return _from_hub(split, token) if data_dir is None else _from_folder(checked_folder(data_dir), split)


def _configs(split: str) -> dict[str, str]:
    """Key -> configuration on the Hub. The local file has the same name."""
    plain = {"forget": split, "retain": TOFU_SPLITS[split], "holdout": split.replace("forget", "holdout")}
    return plain | {"forget_perturbed": f"{split}_perturbed"} | {key: key for key in ("retain_perturbed", *CHOICES)}


def _from_hub(split: str, token: str | bool | None) -> DatasetDict:
    data = DatasetDict()
    for key, config in _configs(split).items():
        rows, where = from_hub(REPO, config, "train", token)
        data[key] = _perturbed(rows, key, where)[0] if key in NUM_WRONG else _plain(rows, where)
    return data


def _from_folder(folder: Path, split: str) -> DatasetDict:
    configs = _configs(split)
    files = {key: find_file(folder, _names(config), config) for key, config in configs.items()}
    files["retain"] = files["retain"] or _only_retain(folder)
    for key in NUM_WRONG:  # columns of the set itself, under its own name
        name = configs[key].removesuffix("_perturbed")
        own = files[key.removesuffix("_perturbed")] if key in PARAPHRASED else find_file(folder, _names(name), name)
        files[key] = files[key] or own
    missing = [key for key, file in files.items() if file is None and key != "holdout"]
    if missing:
        tried = "; ".join(f"{key}: {', '.join(_names(configs[key]))}" for key in missing)
        raise ValueError(f"data_dir {str(folder)!r} has no file for {missing}. Tried: {tried}.")
    data, stand_ins = DatasetDict(), []
    for key, file in files.items():
        if file is None:
            continue
        if key not in NUM_WRONG:
            data[key] = _plain(read_rows(file), str(file))
            continue
        data[key], invented = _perturbed(read_rows(file), key, str(file), invent=True)
        stand_ins += [key] * invented
    if stand_ins:
        warnings.warn(
            f"{str(folder)!r} has no wrong answers (column 'perturbed_answer') for {stand_ins}: answers of other rows "
            "of the same file serve as wrong ones, and the answer itself as its paraphrase where there is none. "
            "Numbers on these sets compare only among themselves.",
            stacklevel=3,
        )
    return data


def _names(config: str) -> list[str]:
    """The file names that may hold a configuration, relative to the folder."""
    return [f"{config}{middle}{suffix}" for middle in ("", "/train") for suffix in (".jsonl", ".json")]


def _only_retain(folder: Path) -> Path | None:
    """A retain file of another size (`retain300.jsonl`), if it is the only one."""
    names = sorted(f.name for f in folder.iterdir() if re.fullmatch(r"retain\d+\.jsonl?", f.name))
    return find_file(folder, names, "retain")


def _plain(rows: Iterable[Any], where: str) -> Dataset:
    table = [{column: row[column] for column in QA} for row in checked_rows(rows, QA, where)]
    return Dataset.from_list(table, features=Features({column: Value("string") for column in QA}))


def _perturbed(rows: Iterable[Any], key: str, where: str, *, invent: bool = False) -> tuple[Dataset, bool]:
    """Returns the set in the schema, and whether its wrong answers are substitutes, which only `invent` allows."""
    checked = list(checked_rows(rows, QA, where))
    given = set(checked[0]) if invent else set(checked[0]) | {"perturbed_answer"}
    invented = "perturbed_answer" not in given
    wrong = (
        _other_answers([row["answer"] for row in checked], NUM_WRONG[key], where)
        if invented
        else [_strings(row, "perturbed_answer", f"{where}, row {i}") for i, row in enumerate(checked, 1)]
    )
    columns: dict[str, list] = {column: [row[column] for row in checked] for column in QA}
    if key in PARAPHRASED:
        for one in ("paraphrased_question", "paraphrased_answer"):
            if one in given:
                columns[f"{one}s"] = [_strings(row, one, f"{where}, row {i}") for i, row in enumerate(checked, 1)]
                columns[one] = [several[0] for several in columns[f"{one}s"]]
        if "paraphrased_answer" not in columns:
            if not invented:
                raise ValueError(f"{where}, row 1 has no column 'paraphrased_answer'; it has {sorted(checked[0])}.")
            columns["paraphrased_answer"] = columns["answer"]
    columns["perturbed_answer"] = wrong
    types = {name: List(Value("string")) if isinstance(c[0], list) else Value("string") for name, c in columns.items()}
    return Dataset.from_dict(columns, features=Features(types)), invented


def _strings(row: Mapping[str, Any], column: str, where: str) -> list[str]:
    """A column that holds one string or several, as a list of at least one."""
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}; it has {sorted(row)}.")
    value = row[column]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        kind = type(value).__name__
        raise TypeError(f"{where}, column {column!r} is of type {kind}; it must be a string or a list of strings.")
    if not values:
        raise ValueError(f"{where}, column {column!r} is an empty list; it must hold at least one string.")
    return values


def _other_answers(answers: list[str], count: int, where: str, seed: int = 0) -> list[list[str]]:
    """For each answer, up to `count` different answers of other rows, drawn from the seed."""
    different = sorted(set(answers))
    if len(different) < 2:
        raise ValueError(f"{where} has no column 'perturbed_answer', and no two different answers to draw from.")
    draw = random.Random(seed)
    others = ([other for other in different if other != answer] for answer in answers)
    return [draw.sample(pool, min(count, len(pool))) for pool in others]
