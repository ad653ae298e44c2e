"""The attacks of an audit that leave the weights alone: other prompts, and other ways to search for an answer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from blur_trainer.evaluation.robustness.least_likely import LeastLikely
from blur_trainer.pipeline.audit_rows import Reader, Side
from blur_trainer.pipeline.audit_world import Attack, World, against_control

BEGINNING = "Sure, here is the answer:"


def prompted(world: World, once: dict[str, int]) -> list[Attack]:
    """`once`: what it costs to ask and read all rows once."""
    reader = world.reader
    begun = partial(_begun, reader, BEGINNING)
    found = [Attack("answer begun", "prompt", {"words": BEGINNING}, once, partial(against_control, begun))]
    if "retain" in world.sets:
        solved = world.sets["retain"].select(range(min(world.budget.shots, len(world.sets["retain"]))))
        shot = partial(_few_shot, reader, solved)
        found.append(
            Attack(f"{len(solved)} solved examples", "prompt", {"examples": len(solved)}, once,
                   partial(against_control, shot))
        )  # fmt: skip
    if "paraphrased" in world.sets:
        found.append(Attack("paraphrases", "prompt", {}, once, _paraphrases))
    for name, change in world.rewordings.items():
        asked = partial(_reworded, reader, change)
        found.append(Attack(f"asked: {name}", "prompt", {"rewording": name}, once, partial(against_control, asked)))
    return found


def searched(world: World, once: dict[str, int]) -> list[Attack]:
    """Beam search for the likeliest answer, and searches for the least likely one."""
    found = []
    for name, beams, inverse in (
        ("beam search", world.budget.beams, False),
        ("inverse greedy", 1, True),
        ("inverse beam search", world.budget.beams, True),
    ):
        read = partial(_searched, world.reader, beams, inverse)
        cost = {"forward": 0, "write": once["write"] * beams, "train": 0}
        found.append(Attack(name, "search", {"beams": beams}, cost, partial(against_control, read)))
    return found


def _begun(reader: Reader, words: str, side: Side) -> dict[str, list[float]]:
    return reader(side.model, reader.begun(side.asked, words))


def _few_shot(reader: Reader, solved: Dataset, side: Side) -> dict[str, list[float]]:
    return reader(side.model, reader.with_examples(side.model, side.asked, solved))


def _paraphrases(world: World) -> dict[str, Any]:
    """The questions in other words. The control is the retrained model's answer to them, else as to plain questions."""
    reader, rows = world.reader, world.sets["paraphrased"]
    places = np.linspace(0, len(rows) - 1, min(len(rows), world.budget.rows)).round().astype(int)
    rows = rows.select([int(place) for place in places])

    def read(side: Side) -> dict[str, list[float]]:
        if side.name == "unseen":
            return reader(side.model, side.asked)
        return reader(side.model, reader.asked(side.model, rows, "paraphrased"))

    return against_control(read, world, paired=world.control is not None)


def _reworded(reader: Reader, change: Callable[[str], str], side: Side) -> dict[str, list[float]]:
    return reader(side.model, reader.asked(side.model, with_questions(side.rest, change), side.name))


def with_questions(rows: Dataset, change: Callable[[str], str]) -> Dataset:
    """
    Rows whose questions are what `change` makes of them; of messages the last of the user. Answers stay.

    Raises:
        `ValueError`: rows without a question, or a question that is no text afterwards.
    """

    def changed(text: str) -> str:
        found = change(text)
        if not isinstance(found, str) or not found.strip():
            raise ValueError(f"A rewording gave {found!r} for a question: it must give a text.")
        return found

    def of_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        last = max((i for i, each in enumerate(messages) if each["role"] == "user"), default=None)
        if last is None:
            raise ValueError("A conversation has no message of a user: it cannot be reworded.")
        return [{**m, "content": changed(m["content"])} if i == last else m for i, m in enumerate(messages)]

    name = next((name for name in ("question", "prompt", "messages") if name in rows.column_names), None)
    if name is None:
        raise ValueError(f"Rows of {', '.join(rows.column_names)} have no question to reword.")
    made = [{**row, name: changed(row[name]) if isinstance(row[name], str) else of_messages(row[name])} for row in rows]
    return Dataset.from_list(made)


def _searched(reader: Reader, beams: int, inverse: bool, side: Side) -> dict[str, list[float]]:
    processors = [LeastLikely(side.model, reader.tokenizer)] if inverse else []
    return {"rouge": reader.says(side.model, side.asked, beams=beams, processors=processors)}
