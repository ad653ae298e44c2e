"""Tells the format of a dataset from its columns, and refuses columns that could be taken in two ways."""

from collections.abc import Iterable

# The first match is the format: tokens first (the user has tokenized already), plain text last.
FORMATS: dict[str, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
ACCEPTED = "`text`, `prompt`+`completion`, `messages`, `question`+`answer` or `input_ids`(+`labels`)"

#: How well a model may know a row that never saw it, in nats per token: `data.levels`.
LEVEL = "forget_level"
_BESIDE_A_PROMPT = ("refusal", "alternative", "chat_template_kwargs", "tools", LEVEL)
#: Columns that say which tokens are targets, as tokenizers and TRL name them.
MASKS = ("completion_mask", "assistant_masks")
# What a format reads beside the columns that make it.
_ALSO_READ: dict[str, tuple[str, ...]] = {
    "input_ids": (
        *("labels", "attention_mask", *MASKS),
        *("refusal_input_ids", "refusal_labels", "ref_logps", "refusal_ref_logps", LEVEL),
    ),
    "messages": _BESIDE_A_PROMPT,
    "prompt-completion": _BESIDE_A_PROMPT,
    "question-answer": _BESIDE_A_PROMPT,
    "text": (LEVEL,),
}
# Columns that usually hold a part of what is asked or answered: none of them may be dropped in silence.
_MEANINGFUL = {
    *(column for columns in FORMATS.values() for column in columns),
    *("labels", "target", "targets", "answers", "output", "outputs", "response", "responses", "chosen", "rejected"),
    *("instruction", "input", "inputs", "context", "system", "system_prompt", "conversation", "conversations"),
    *("query", "choices", "summary"),
}


def find_format(columns: Iterable[str], role: str) -> str:
    """
    Name of the first format in `FORMATS` whose columns are all present.

    Raises `ValueError` where there is none, or where another column could be meant as well: a dataset with `text` and
    `labels` may be texts, or questions and answers.
    """
    columns = list(columns)
    for name, needed in FORMATS.items():
        if set(needed) <= set(columns):
            _refuse_ambiguous(name, columns, role)
            return name
    raise ValueError(
        f"The `{role}` dataset has the columns {columns}, but needs {ACCEPTED}: rename them, or give what "
        f"`blur_trainer.read_rows(dataset, role={role!r}, has_template=bool(tokenizer.chat_template)).dataset` has. It "
        "knows the usual names (`instruction`, `response`, `conversations`, ...), and `columns='prompt=COLUMN,"
        "completion=COLUMN'` tells it others."
    )


def columns_read(fmt: str, columns: Iterable[str]) -> list[str]:
    """The columns that tokenization reads. The others may hold anything, images and sound included."""
    return [column for column in columns if column in FORMATS[fmt] or column in _ALSO_READ[fmt]]


def _refuse_ambiguous(fmt: str, columns: list[str], role: str) -> None:
    read = columns_read(fmt, columns)
    rivals = [column for column in columns if column in _MEANINGFUL and column not in read]
    if fmt == "input_ids":
        if "seq_lengths" in columns:
            raise ValueError(
                f"The `{role}` dataset has a column `seq_lengths`, so several examples are packed into one row: give "
                "one example per row (the batches need no packing)."
            )
        # Tokens with their targets leave no question; without them, all tokens are targets, as they are of a text.
        told = set(read) & {"labels", *MASKS}
        rivals = [] if told else [column for column in rivals if column != "text"]
    if rivals:
        one = f"{', '.join(f'`{column}`' for column in rivals)}"
        raise ValueError(
            f"The `{role}` dataset has {_named(FORMATS[fmt])} and also {one}: which of them is meant cannot be told. "
            f"Keep the columns of one format (`dataset.select_columns({read})`), rename them to {ACCEPTED}, or "
            "name them in `blur_trainer.read_rows(dataset, columns=...)`."
        )


def _named(columns: Iterable[str]) -> str:
    return "+".join(f"`{column}`" for column in columns)
