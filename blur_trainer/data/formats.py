"""A dataset in any of the accepted formats -> a tokenized dataset."""

import logging
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from blur_trainer.data.chat import check_tokenizer, has_chat_template, writes_the_day
from blur_trainer.data.columns import FORMATS, LEVEL, columns_read, find_format
from blur_trainer.data.encoding import RowEncoder, leading_special_ids
from blur_trainer.data.levels import check_levels
from blur_trainer.data.notices import warn_of_prompt
from blur_trainer.data.options import check_alternatives, check_options
from blur_trainer.data.sources import check_dataset, column_names, to_dataset

logger = logging.getLogger(__name__)

NUM_NAMED_ROWS = 5  # an error message lists at most this many row indices


def tokenize_dataset(
    dataset: Dataset | IterableDataset | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    role: str,
    max_length: int | None,
    drop_empty: bool = False,
    refusals: bool = False,
    seed: int = 0,
    qa_template: str = "Question: {question}\nAnswer:",
    num_proc: int | None = None,
    vocab_size: int | None = None,
    day: date | None = None,
    alternatives: bool = False,
    levels: bool = False,
) -> Dataset | IterableDataset:
    r"""
    Tokenize a dataset for unlearning. Labels are -100 where a token is no target.

    | columns | tokens | targets |
    |---|---|---|
    | `text` | BOS, text, EOS; split into pieces of `max_length`, each with BOS | all |
    | `prompt`, `completion` (strings) | BOS, prompt + completion, EOS | completion, EOS |
    | `prompt`, `completion` (messages) | the chat template's | completion |
    | `messages` (the last one is the assistant's) | the chat template's | last message |
    | `question`, `answer` | the chat template's; without one: BOS, `qa_template` + " " + answer, EOS | answer (EOS) |
    | `input_ids` [, `labels`] | as given | `labels`, else all |

    BOS is what the tokenizer puts in front of a sequence (some tokenizers put nothing). Of a conversation, the answer
    is the content and what closes it; what the chat template writes before the content (a header, an empty thinking
    block) is prompt: see [`~blur_trainer.data.chat.render`]. `prompt` and `completion` that are strings are taken as
    they are, as in TRL, also if the tokenizer has a chat template; then a warning says so. In tokens, the answer starts
    where the tokenized prompt and the tokenized prompt + answer first differ. All formats but `text` are cut on the
    right at `max_length`.

    A dataset has the columns of one format. Others that could be meant as well (`text` beside `labels`, `answer`,
    `output` ...) are refused by name; beside `input_ids` and `labels` there may be any. The rest is not read. Rows are
    read as the dataset gives them, through a transform too. A conversation may have the columns `tools` and
    `chat_template_kwargs`. Beside `input_ids` these are read: `attention_mask` (padding is dropped),
    `completion_mask` and `assistant_masks` (which tokens are targets, if there are no `labels`), and
    `refusal_input_ids`, `refusal_labels`, `ref_logps` and `refusal_ref_logps`.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`):
            The examples. A stream's first example is checked now, the others when they are read.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer. `None` is enough for the `input_ids` format.
        role (`str`):
            What the dataset is for (`"forget"`, `"retain"`), used in messages.
        max_length (`int`, *optional*):
            Longest example in tokens, special tokens included. `None`: no limit.
        drop_empty (`bool`, *optional*, defaults to `False`):
            Leave out, with a warning, examples that have no target left, or whose text or answer is empty, instead of
            raising an error.
        refusals (`bool`, *optional*, defaults to `False`):
            Add `refusal_input_ids` and `refusal_labels`: the same prompt with a refusal as the answer. The refusal is
            the column `refusal`, else drawn from `blur_trainer.data.refusals.REFUSALS`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of that draw; the row index is mixed in.
        qa_template (`str`, *optional*, defaults to `"Question: {question}\nAnswer:"`):
            Prompt for `question` where the tokenizer has no chat template. The answer follows after one space.
        num_proc (`int`, *optional*):
            Processes for `Dataset.map`. A stream is tokenized where it is read instead.
        vocab_size (`int`, *optional*):
            Size of the model's vocabulary; when given, every token id is checked against it.
        day (`datetime.date`, *optional*):
            What chat templates get that write today's date. Default: today.
        alternatives (`bool`, *optional*, defaults to `False`):
            As `refusals`, but the preferred answers are those of the column `alternative`, a string or a list of
            strings: one example for each, with the row's own answer beside it.
        levels (`bool`, *optional*, defaults to `False`):
            Keep the column `forget_level`, nats per token: all examples that are made of a row have its level.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` (for a stream), with the columns `input_ids`, `labels` and
        where they apply `refusal_input_ids`, `refusal_labels`, `ref_logps`, `refusal_ref_logps`, `forget_level`.

    Raises:
        `TypeError` or `ValueError`, naming the role, the row and the remedy.
    """
    check_dataset(dataset, role)
    columns = column_names(dataset)
    fmt = find_format(columns, role)
    columns = columns_read(fmt, columns)
    if tokenizer is None and fmt != "input_ids":
        raise ValueError(
            f"The `{role}` dataset is in the `{fmt}` format and there is no tokenizer: pass `processing_class` "
            "(the model has none beside it), or a dataset with `input_ids`."
        )
    check_tokenizer(tokenizer, fmt, role)
    prefix = leading_special_ids(tokenizer) if tokenizer is not None else []
    check_alternatives(fmt, columns, role, alternatives)
    check_levels(columns, role, levels)
    refusals = refusals or alternatives
    check_options(fmt, columns, role, refusals, qa_template, max_length, shortest=max(2, len(prefix) + 1))
    dataset = to_dataset(dataset, fmt, role, has_template=has_chat_template(tokenizer))
    day = (day or date.today()) if writes_the_day(tokenizer) else None
    options = (max_length, refusals, seed, qa_template, vocab_size, day, alternatives, levels)
    encoder = RowEncoder(tokenizer, fmt, role, prefix, *options)
    first = next(iter(dataset))
    checks: dict[str, Any] = {"role": role, "max_length": max_length, "drop_empty": drop_empty}
    examples = encoder.encode(first, 0)
    warn_of_prompt(encoder, first)
    map_kwargs = {
        "batched": True,
        "with_indices": True,
        "remove_columns": columns,
        "features": _features(fmt, columns, refusals, levels),
    }
    if isinstance(dataset, IterableDataset):
        for example in examples:
            _keep(example, **checks)
        stream = dataset.map(encoder, **map_kwargs).filter(_keep, fn_kwargs=checks)
        return stream.remove_columns(["row", "empty"])
    encoded = dataset.map(encoder, num_proc=num_proc, desc=f"Tokenizing {role} dataset", **map_kwargs)
    return _without_empty(encoded, **checks)


def _features(fmt: str, columns: Sequence[str], refusals: bool, levels: bool) -> Features:
    """The schema. It must be given, because Arrow cannot infer a column's type from an empty list."""
    tokens = List(Value("int64"))
    features = {"input_ids": tokens, "labels": tokens, "row": Value("int64"), "empty": Value("bool")}
    given = set(columns) if fmt == "input_ids" else set()
    if "refusal_input_ids" in given or refusals:
        features["refusal_input_ids"] = tokens
    if "refusal_labels" in given or refusals:
        features["refusal_labels"] = tokens
    features |= {name: Value("float32") for name in ("ref_logps", "refusal_ref_logps") if name in given}
    return Features(features | ({LEVEL: Value("float32")} if levels else {}))


def _keep(example: Mapping[str, Any], role: str, max_length: int | None, drop_empty: bool) -> bool:
    """Whether an example of a stream has a target. Without `drop_empty`, raises if it has none."""
    if not example["empty"]:
        return True
    subject = f"Row {example['row']} of the `{role}` dataset"
    if not drop_empty:
        raise ValueError(_no_target(f"{subject} is empty, or has", max_length))
    logger.warning("%s is dropped: it is empty, or has no answer token left within max_length=%s.", subject, max_length)
    return False


def _without_empty(encoded: Dataset, role: str, max_length: int | None, drop_empty: bool) -> Dataset:
    """Removes the bookkeeping columns, and the examples without a target (by default they are an error)."""
    empty = list(encoded["empty"])
    rows = sorted({row for row, is_empty in zip(encoded["row"], empty, strict=True) if is_empty})
    if rows:
        named = ", ".join(map(str, rows[:NUM_NAMED_ROWS])) + (", ..." if len(rows) > NUM_NAMED_ROWS else "")
        counted = f"{sum(empty)} of the {len(encoded)} examples of the `{role}` dataset (rows {named})"
        if not drop_empty:
            raise ValueError(_no_target(f"{counted} are empty, or have", max_length))
        if all(empty):
            raise ValueError(
                f"{counted} are empty, or have no answer token left within max_length={max_length}: after "
                "`drop_empty=True` none remain; raise `max_length`, or give rows with text."
            )
        logger.warning(
            "%s are dropped: they are empty, or have no answer token left within max_length=%s.", counted, max_length
        )
        encoded = encoded.select([index for index, is_empty in enumerate(empty) if not is_empty])
    return encoded.remove_columns(["row", "empty"])


def _no_target(subject: str, max_length: int | None) -> str:
    return (
        f"{subject} no answer token left within max_length={max_length}: give text, raise `max_length`, or leave them "
        "out with `drop_empty=True`."
    )


def chunk_documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """
    Cut a corpus as MUSE does: one long token stream, in pieces of equal length, ignoring document borders.

    The tokens of all documents (no special tokens) are concatenated and cut into pieces of `max_length - 1`, each with
    BOS in front; a tokenizer without BOS gives pieces of `max_length`. A short last piece is filled once from the start
    of the first piece, BOS included. So a corpus shorter than half a piece stays short. Every token is a target.

    Args:
        texts (`list[str]`): The documents.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        max_length (`int`): Tokens per piece, BOS included.

    Returns:
        `list[dict]`: Examples `{"input_ids", "labels"}`, `labels` equal to `input_ids`.

    Source: `DefaultDataset` of the MUSE benchmark's baselines (its `.txt` route).
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("`texts` must be a list of strings, one per document.")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if max_length < len(bos) + 1:
        raise ValueError(f"`max_length` is {max_length}: it must be at least {len(bos) + 1}, BOS included.")
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise ValueError(f"The {len(texts)} documents given hold no token: pass documents with text.")
    room = max_length - len(bos)
    pieces = [bos + tokens[start : start + room] for start in range(0, len(tokens), room)]
    pieces[-1] = (pieces[-1] + pieces[0])[:max_length]
    return [{"input_ids": piece, "labels": list(piece)} for piece in pieces]


__all__ = ["FORMATS", "chunk_documents", "tokenize_dataset"]
