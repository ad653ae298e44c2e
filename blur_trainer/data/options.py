"""Options of the tokenization that do not go with a dataset."""

from collections.abc import Sequence


def check_options(
    fmt: str,
    columns: Sequence[str],
    role: str,
    refusals: bool,
    qa_template: str,
    max_length: int | None,
    *,
    shortest: int,
) -> None:
    if refusals and fmt in ("text", "input_ids") and "refusal_input_ids" not in columns:
        raise ValueError(
            f"`refusals=True` needs a prompt to refuse, but the `{role}` dataset is in the `{fmt}` format: give "
            "`prompt`+`completion`, `messages` or `question`+`answer`."
        )
    if "{question}" not in qa_template:
        raise ValueError(f"`qa_template` is {qa_template!r}: it must contain '{{question}}'.")
    if max_length is not None and max_length < shortest:
        raise ValueError(
            f"`max_length` is {max_length} for the `{role}` dataset: it must be at least {shortest}, because the "
            "first token of an example is no target."
        )


def check_alternatives(fmt: str, columns: Sequence[str], role: str, alternatives: bool) -> None:
    if not alternatives or "refusal_input_ids" in columns:
        return
    if fmt in ("text", "input_ids"):
        raise ValueError(
            f"`altpo` needs a prompt that has another answer, but the `{role}` dataset is in the `{fmt}` format: give "
            "`prompt`+`completion`, `messages` or `question`+`answer` (or tokens as `refusal_input_ids` and "
            "`refusal_labels`)."
        )
    if "alternative" not in columns:
        raise ValueError(
            f"`altpo` needs other answers, but the `{role}` dataset has no column `alternative`: fill it yourself, or "
            "by `blur_trainer.generate_alternatives(model, tokenizer, dataset)`."
        )
