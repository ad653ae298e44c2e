"""Makes more rows from a forget set: paraphrases, and the same questions with wrong answers.

ULD trains its assistant to remember the forget set and its paraphrases, and to be uniform on the retain set and on
wrong answers. Otherwise it remembers one wording, and subtracting it forgets one wording (Ji et al., 2024,
arXiv:2406.08607; there a language model writes both).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from blur_trainer.data.columns import find_format
from blur_trainer.data.sources import check_dataset, column_names
from blur_trainer.uld.rewording import perturbed_rows, reworded_rows

WAYS = ("columns", "rules")
Row = Mapping[str, Any]
Rewrite = Callable[[Row], list[Mapping[str, str]]]


def paraphrases(forget: Dataset | Sequence[Row], by: str | Rewrite = "columns", num: int = 2, seed: int = 0) -> Dataset:
    """
    Other wordings of a forget set, which the assistant shall remember too.

    Args:
        forget ([`~datasets.Dataset`] or list of dicts):
            With `question` and `answer`, or `text`.
        by (`str` or callable, defaults to `"columns"`):
            * `"columns"`: the columns `paraphrased_questions` and `paraphrased_answers`, or `paraphrased_question` and
              `paraphrased_answer`; strings or lists of them, the k-th question with the k-th answer.
            * `"rules"`: no language model. Question and answer get other frames, which keep their facts. A text gives
              half of its sentences (consecutive ones), shuffled.
            * a callable that maps a row to a list of `{"question", "answer"}` (`{"text"}` for texts).
        num (`int`, defaults to `2`):
            At most this many per row. `"columns"` takes the first ones.
        seed (`int`, defaults to `0`):
            Seed of the rules. Each row draws from it and from its own index.

    Returns:
        [`~datasets.Dataset`]: `question` and `answer` (or `text`), in the order of the rows. The rows themselves are
        not included.

    TOFU's evaluation also reads `paraphrased_answer` and `perturbed_answer`. So with `"columns"` the test data is
    trained on, as in ULD's own TOFU runs. `"rules"` keeps both apart.

    Raises:
        `ValueError`: an unknown way, a missing column, another format, or nothing to return.
        `TypeError`: a callable or a column that gives something other than strings.
    """
    return _augmented(forget, by, num, seed, perturb=False)


def perturbed_answers(
    forget: Dataset | Sequence[Row], by: str | Rewrite = "columns", num: int = 2, seed: int = 0
) -> Dataset:
    """
    The questions of a forget set with wrong answers of the same form. The assistant shall be uniform on them.

    Args:
        forget ([`~datasets.Dataset`] or list of dicts), num (`int`, defaults to `2`), seed (`int`, defaults to `0`):
            As in [`paraphrases`].
        by (`str` or callable, defaults to `"columns"`):
            * `"columns"`: `perturbed_answer`, a string or a list.
            * `"rules"`: no language model. First choice: the answer to the same question about another subject, with
              this subject's name. Else: names and numbers are exchanged for those of other rows. Else: another row's
              answer. In texts, names and numbers are exchanged.
            * a callable that maps a row to a list of `{"question", "answer"}` (`{"text"}` for texts).

    Returns:
        [`~datasets.Dataset`]: as [`paraphrases`]. No answer equals the right one; a column or callable that gives the
        right one raises an error. In a small set the rules may find fewer than `num`.
    """
    return _augmented(forget, by, num, seed, perturb=True)


def _augmented(forget: Any, by: Any, num: int, seed: int, *, perturb: bool) -> Dataset:
    rows, columns = _checked_rows(forget)
    if not isinstance(num, int) or num < 1:
        raise ValueError(f"num is {num!r}; it takes a whole number of rows, at least 1.")
    if callable(by):
        made = [_called(by, row, i, columns)[:num] for i, row in enumerate(rows)]
    elif by == "columns":
        made = _from_columns(rows, columns, num, perturb)
    elif by == "rules":
        make = perturbed_rows if perturb else reworded_rows
        draws = [random.Random(f"{seed}-{i}") for i in range(len(rows))]
        made = make(rows, columns, num, draws)
    else:
        raise ValueError(f"by is {by!r}; it must be one of {list(WAYS)} or a callable.")
    if perturb:
        _check_wrong(rows, made, columns[-1])
    table = [row for several in made for row in several]
    if not table:
        kind = "wrong answer" if perturb else "paraphrase"
        raise ValueError(f"by={by!r} gives no {kind} for any of the {len(rows)} rows of the forget set.")
    return Dataset.from_list(table)


def _checked_rows(forget: Any) -> tuple[list[Row], tuple[str, ...]]:
    check_dataset(forget, "forget")
    if isinstance(forget, IterableDataset):
        raise TypeError("The `forget` dataset is a stream: rows are reworded with others of the set; load it whole.")
    fmt = find_format(column_names(forget), "forget")
    accepted = {"question-answer": ("question", "answer"), "text": ("text",)}
    if fmt not in accepted:
        raise ValueError(
            f"The `forget` dataset is in the `{fmt}` format: only `question`+`answer` and `text` can be reworded."
        )
    rows: list[Row] = [dict(row) for row in forget]
    for i, row in enumerate(rows):
        for column in accepted[fmt]:
            if not isinstance(row.get(column), str):
                kind = type(row.get(column)).__name__
                raise TypeError(
                    f"Column `{column}` in row {i} of the `forget` dataset is a {kind}: a string is needed."
                )
    return rows, accepted[fmt]


def _called(by: Rewrite, row: Row, i: int, columns: tuple[str, ...]) -> list[dict[str, str]]:
    made = by(row)
    good = isinstance(made, list) and all(
        isinstance(one, Mapping) and all(isinstance(one.get(column), str) for column in columns) for one in made
    )
    if not good:
        raise TypeError(f"The callable gave {made!r} for row {i}: it must give a list of dicts with {list(columns)}.")
    return [{column: one[column] for column in columns} for one in made]


def _from_columns(rows: list[Row], columns: tuple[str, ...], num: int, perturb: bool) -> list[list[dict[str, str]]]:
    if columns == ("text",):
        raise ValueError("by='columns' is for questions and answers; for texts pass by='rules' or a callable.")
    if perturb:
        wrong = _lists(rows, ("perturbed_answer",))
        return [[{"question": row["question"], "answer": a} for a in wrong[i][:num]] for i, row in enumerate(rows)]
    questions = _lists(rows, ("paraphrased_questions", "paraphrased_question"))
    answers = _lists(rows, ("paraphrased_answers", "paraphrased_answer"))
    pairs = [list(zip(*both, strict=False))[:num] for both in zip(questions, answers, strict=True)]
    return [[{"question": question, "answer": answer} for question, answer in several] for several in pairs]


def _lists(rows: list[Row], names: tuple[str, ...]) -> list[list[str]]:
    """The first of these columns that exists, each value as a list of strings."""
    name = next((name for name in names if name in rows[0]), None)
    if name is None:
        raise ValueError(
            f"The `forget` dataset has no column {' or '.join(map(repr, names))}, which by='columns' reads; it has "
            f"{sorted(rows[0])}. Pass a set that has it (TOFU's `forget_perturbed`), by='rules' or a callable."
        )
    lists = []
    for i, row in enumerate(rows):
        values = [row[name]] if isinstance(row[name], str) else row[name]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise TypeError(
                f"Column {name!r} in row {i} of the `forget` dataset must be a string or a list of strings."
            )
        lists.append(values)
    return lists


def _check_wrong(rows: list[Row], made: list[list[dict[str, str]]], column: str) -> None:
    for i, (row, several) in enumerate(zip(rows, made, strict=True)):
        for one in several:
            if one[column].strip() == row[column].strip():
                raise ValueError(f"A wrong {column} of row {i} equals the right one: {row[column]!r}.")
