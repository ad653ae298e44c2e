"""What an audit attacks, beside what, and what the certificate has of one attack."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from blur_trainer.pipeline.audit_budget import Budget
from blur_trainer.pipeline.audit_judged import Scores, compared
from blur_trainer.pipeline.audit_rows import Reader, Side


@dataclass
class World:
    """
    What is attacked, and beside what.

    Args:
        control: the retrained model on the same rows, or the model itself on rows that no model saw, or `None`.
        before: the model before unlearning.
        sets: the other sets, by role.
        plain: of the model as it is, once it was measured: the control where there is none.
        rewordings: by name, what makes another question of a question.
    """

    reader: Reader
    budget: Budget
    seed: int
    unlearned: Side
    control: Side | None
    before: PreTrainedModel | None
    sets: Mapping[str, Dataset]
    plain: Scores | None = None
    rewordings: Mapping[str, Callable[[str], str]] = field(default_factory=dict)

    @property
    def retrained(self) -> PreTrainedModel | None:
        return self.control.model if self.control is not None and self.control.name == "retrained" else None


@dataclass(frozen=True)
class Attack:
    """
    Args:
        name: as table and certificate name it.
        kind: `"plain"`, `"leak"`, `"relearning"`, `"bits"`, `"weights"`, `"prompt"`, `"search"`
            or `"inside"`.
        settings: that decide it.
        cost: how many batches are read (`forward`) and written (`write`), and how many steps are trained (`train`), of
            model and control together.
        run: makes the certificate's entry.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    cost: dict[str, int]
    run: Callable[[World], dict[str, Any]] = field(compare=False)


Read = Callable[[Side], dict[str, list[float]]]


def against_control(read: Read, world: World, paired: bool = True) -> dict[str, Any]:
    """Attacks the model and its control, and compares row by row. Without a control: with the model as it is."""
    ours = read(world.unlearned)
    control = read(world.control) if world.control is not None else world.plain
    if world.plain is None:
        world.plain = ours
    same = paired and (world.control is None or world.control.name == "retrained")
    return entry(ours, control, same, world.seed)


def entry(ours: Scores, control: Scores | None, paired: bool, seed: int) -> dict[str, Any]:
    """Numbers, control and judgement. `recovered` is `None` where nothing can be compared."""
    found: dict[str, Any] = {"numbers": _mean(ours), "control": {}, "compared": {}, "recovered": None}
    found["rows"] = {name: [round(value, 6) for value in numbers] for name, numbers in ours.items()}
    if control is None:
        return found | {"why": "there is no control, and this is the model as it is"}
    found["control"] = _mean(control)
    try:
        each = {name: compared(ours[name], control[name], paired=paired, seed=seed) for name in ours}
    except ValueError as error:
        return found | {"why": str(error)}
    found["compared"] = {name: one.said() for name, one in each.items()}
    return found | {"recovered": any(one.above for one in each.values())}


def sides(world: World) -> int:
    return 1 if world.control is None else 2


def cost_of(world: World, rows: int) -> dict[str, int]:
    batches = math.ceil(rows / world.reader.batch_size) * sides(world)
    return {"forward": batches, "write": batches, "train": 0}


def _mean(scores: Scores) -> dict[str, float]:
    return {name: float(np.mean(numbers)) for name, numbers in scores.items()}
