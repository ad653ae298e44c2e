"""WMDP (weapons of mass destruction proxy): its corpora and questions from the Hub or a local folder, in one schema.

The corpora are one [`~datasets.DatasetDict`], each set with one column, `text`:

| key | on the Hub | local file (`_` for `-` will do) |
|---|---|---|
| `forget_bio` | `cais/wmdp-bio-forget-corpus` (gated) | `bio-forget-corpus` or `bio-remove-dataset` |
| `forget_cyber` | `cais/wmdp-corpora`, `cyber-forget-corpus` | the same with `cyber` |
| `retain` | `Salesforce/wikitext`, `wikitext-2-raw-v1`, split test | `wikitext` |
| `retain_bio`, `retain_cyber` | `cais/wmdp-corpora`, `bio-retain-corpus` | `bio-retain-corpus` |

A local `.jsonl` or `.txt` file has one text per line: an object with `text` (other keys are ignored), a JSON string, or
a plain line. The first line decides which. A `.json` file is a list of objects or of strings, or has one per line.

Differs from WMDP's code, which reads the lines of all files but `bio-forget-corpus` as plain text, with the quotes and
escapes of JSON.

Source: Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning" (2024, arXiv:2403.03218),
https://huggingface.co/datasets/cais/wmdp.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from blur_trainer.choices import LETTERS
from blur_trainer.data.files import checked_folder, checked_rows, find_file, from_hub, read_lines, read_rows
from blur_trainer.toy.wmdp import FORGET_TOPICS, TOPICS, topic_corpora, topic_questions

CORPORA = ("wmdp", "embedded")
WMDP_TOPICS = ("bio", "cyber")
WMDP_QUESTIONS = ("wmdp-bio", "wmdp-cyber", "wmdp-chem")
GATED = "cais/wmdp-bio-forget-corpus"
SHARED = "cais/wmdp-corpora"
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
SUFFIXES = (".jsonl", ".json", ".txt")


def load_wmdp(
    corpus: str = "wmdp",
    topics: Sequence[str] | None = None,
    data_dir: str | Path | None = None,
    *,
    topic_retain: bool = False,
    min_length: int = 50,
    max_length: int | None = None,
    token: str | bool | None = None,
) -> DatasetDict:
    """
    Load the texts to forget, one set per topic, and those to retain.

    Args:
        corpus (`str`, defaults to `"wmdp"`):
            `"wmdp"` from the Hub, or `"embedded"`: invented topics, no network
            ([`~blur_trainer.toy.wmdp.topic_corpora`]).
        topics (`Sequence[str]`, *optional*):
            Some of `"bio"` and `"cyber"` (embedded: `"potions"` and `"machines"`), in this order; by default both.
        data_dir (`str` or `Path`, *optional*):
            Read the sets that this folder has; the others come from the Hub. So only the gated corpus need be local.
        topic_retain (`bool`, defaults to `False`):
            Whether to load WMDP's own retain corpora too (`retain_bio`, `retain_cyber`). Its authors' runs do not use
            them: they retain Wikitext.
        min_length (`int`, defaults to `50`):
            Texts of at most this many characters are dropped, such as Wikitext's empty lines and headings. WMDP's
            loader has the same default, but its command line passes 0 and so keeps the headings.
        max_length (`int`, *optional*):
            Cut texts after so many characters. WMDP's loader has an argument `max_len=2000` but never uses it; its
            tokenizer cuts the texts (512 tokens of bio, 768 of cyber).
        token (`str` or `bool`, *optional*):
            For the Hub. Default: the token that `hf auth login` stored.

    Returns:
        [`~datasets.DatasetDict`]: `forget_{topic}` for each topic, `retain`, and `retain_{topic}` where asked for.

    Raises:
        `ValueError`: unknown corpus or topic; missing folder; empty or malformed file; no text that is long enough.
        `TypeError`: something that is not a string where a text should be.
        `ConnectionError`: the Hub did not deliver; the message says where to ask for access and what to pass.
    """
    if corpus not in CORPORA:
        raise ValueError(f"corpus is {corpus!r}; it must be one of {list(CORPORA)}.")
    for name, value in (("min_length", min_length), ("max_length", max_length)):
        if value is not None and (not isinstance(value, int) or value < (name == "max_length")):
            raise ValueError(f"{name} is {value!r}; it takes a number of characters.")
    known = FORGET_TOPICS if corpus == "embedded" else WMDP_TOPICS
    chosen = known if topics is None else tuple(topics)
    if isinstance(topics, str) or not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise ValueError(f"topics is {topics!r}; of the corpus {corpus!r} it takes one or more of {list(known)}, once.")
    if corpus == "embedded":
        if data_dir is not None or topic_retain:
            raise ValueError("corpus='embedded' is built in: it reads no data_dir and has no topic_retain.")
        made = topic_corpora()
        data = DatasetDict({key: made[key] for key in (*(f"forget_{topic}" for topic in chosen), "retain")})
    else:
        keys = [*(f"forget_{t}" for t in chosen), "retain", *(f"retain_{t}" for t in chosen if topic_retain)]
        folder = None if data_dir is None else checked_folder(data_dir)
        if folder is not None and not any(find_file(folder, _names(key), key) for key in keys):
            tried = ", ".join(_names(key)[0] for key in keys)
            raise ValueError(
                f"data_dir {str(folder)!r} has none of the sets {keys} (tried {tried} and so on): name its files so, "
                "or leave data_dir out for the Hub's."
            )
        data = DatasetDict({key: _texts(key, folder, token) for key in keys})
    return DatasetDict({key: _of_length(rows, key, min_length, max_length) for key, rows in data.items()})


def load_wmdp_questions(
    subset: str = "wmdp-bio", data_dir: str | Path | None = None, *, token: str | bool | None = None
) -> Dataset:
    """
    Load the multiple-choice questions of one topic.

    Args:
        subset (`str`, defaults to `"wmdp-bio"`):
            `"wmdp-bio"` (1273), `"wmdp-cyber"` (1987) or `"wmdp-chem"` (408); of the embedded topics `"potions"`,
            `"machines"` or `"dishes"` (64 each; no network).
        data_dir (`str` or `Path`, *optional*):
            Read `wmdp-bio.jsonl` or `wmdp-bio/test.jsonl` (`_` for `-` and `.json` will do) there instead of the Hub.
        token (`str` or `bool`, *optional*):
            For the Hub, if needed.

    Returns:
        [`~datasets.Dataset`]: `question`, `choices` (list of 4 strings), `answer` (index of the right one, from 0).

    Raises:
        As [`load_wmdp`].
    """
    if subset not in (*WMDP_QUESTIONS, *TOPICS):
        raise ValueError(f"subset is {subset!r}; it must be one of {[*WMDP_QUESTIONS, *TOPICS]}.")
    if subset in TOPICS:
        if data_dir is not None:
            raise ValueError(f"subset={subset!r} is built in and reads no data_dir.")
        return topic_questions(subset)
    rows: Iterable[Any]
    if data_dir is None:
        rows, where = from_hub("cais/wmdp", subset, "test", token)
    else:
        folder = checked_folder(data_dir)
        stems = (subset, subset.replace("-", "_"))
        names = [f"{stem}{middle}{suffix}" for stem in stems for middle in ("", "/test") for suffix in SUFFIXES[:2]]
        file = find_file(folder, names, subset)
        if file is None:
            raise ValueError(f"data_dir {str(folder)!r} has no questions of {subset!r}. Tried: {', '.join(names)}.")
        rows, where = read_rows(file), str(file)
    table = [_question(row, f"{where}, row {i}") for i, row in enumerate(checked_rows(rows, ["question"], where), 1)]
    types = {"question": Value("string"), "choices": List(Value("string")), "answer": Value("int64")}
    return Dataset.from_list(table, features=Features(types))


def _names(key: str) -> list[str]:
    """The file names that may hold a set, relative to the folder."""
    side, _, topic = key.partition("_")
    if not topic:
        return [f"wikitext{suffix}" for suffix in SUFFIXES]
    kinds = (("remove", "dataset"), ("forget", "corpus")) if side == "forget" else (("retain", "corpus"),)
    return [f"{sep.join((topic, *kind))}{suffix}" for kind in kinds for sep in "_-" for suffix in SUFFIXES]


def _texts(key: str, folder: Path | None, token: str | bool | None) -> Dataset:
    names = _names(key)
    file = None if folder is None else find_file(folder, names, key)
    rows: Iterable[Any]
    if file is not None:
        rows, where = read_lines(file), str(file)
    else:
        hint = f"Without access to it, put a copy into a folder as {names[0]} and pass the folder as data_dir"
        hint += ", or pass corpus='embedded'."
        source: tuple[str, str | None, str] = WIKITEXT
        if key == "forget_bio":
            source = (GATED, None, "train")
            hint = (
                f"It is gated: ask for access at https://huggingface.co/datasets/{GATED} with your account, then run "
                f"`hf auth login` or pass token. {hint}"
            )
        elif key != "retain":
            side, topic = key.split("_")
            source = (SHARED, f"{topic}-{side}-corpus", "train")
        rows, where = from_hub(*source, token, hint=hint)
    texts = ({"text": row} if isinstance(row, str) else row for row in rows)
    return Dataset.from_dict({"text": [row["text"] for row in checked_rows(texts, ["text"], where)]})


def _of_length(rows: Dataset, key: str, shortest: int, longest: int | None) -> Dataset:
    texts = [text[:longest] for text in rows["text"] if len(text) > shortest]
    if not texts:
        raise ValueError(
            f"none of the {len(rows)} texts of {key!r} has more than {shortest} characters: lower min_length."
        )
    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))


def _question(row: Any, where: str) -> dict[str, Any]:
    for column in ("choices", "answer"):
        if column not in row:
            raise ValueError(f"{where} has no column {column!r}; it has {sorted(row)}.")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError(f"{where}, column 'choices' is {choices!r}; it must be a list of strings.")
    if len(choices) != len(LETTERS):
        raise ValueError(f"{where}, column 'choices' has {len(choices)} entries; it must have {len(LETTERS)}.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}, column 'answer' is {answer!r}; it must be an index of the choices, 0 to 3.")
    return {"question": row["question"], "choices": choices, "answer": answer}
