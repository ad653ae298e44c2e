"""What an audit is going to do: each attack with its cost in batches and steps, and in seconds by a short timing."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from blur_trainer.evaluation.forget_scores import Known
from blur_trainer.evaluation.robustness.relearning import relearn
from blur_trainer.evaluation.scoring import generate_ids
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.pipeline.audit_attacks import outside
from blur_trainer.pipeline.audit_inside import inside
from blur_trainer.pipeline.audit_world import Attack, World

UNITS = ("forward", "write", "train")
#: what no audit here does
_NEVER = "GPTQ is not in this battery"


def battery(world: World) -> list[Attack]:
    """All attacks that these sets and models allow."""
    return [*outside(world), *inside(world)]


def left_out(world: World, others: int) -> list[str]:
    """What was not tried or was cut, and why. `others`: how many forget rows are not relearned."""
    budget, sets, found = world.budget, world.sets, []
    measured, control = len(world.unlearned.rest), world.control
    if measured < others:
        found.append(f"{measured} of the {others} forget rows that are not relearned are measured (budget)")
    found.append(f"{budget.samples} samples per question, k = {budget.k}; the source of leak@k has 200, 128 (budget)")
    found.append(f"answers are read to {budget.new_tokens} tokens at most (budget)")
    lacking = {
        "retain": "no solved examples, no relearning of it, no probes",
        "hold": "no relearning of other text",
        "paraphrased": "no paraphrases",
    }
    found += [f"there is no `{role}` set: {what}" for role, what in lacking.items() if role not in sets]
    if not world.rewordings:
        found.append("no other language and no wording of one's own: `perturb` of `blur_trainer.audit` takes them")
    if isinstance(world.unlearned.model, LogitDifferenceModel):
        found.append("a `LogitDifferenceModel` has two models: no look inside; audit its target")
    if control is None or control.name != "retrained":
        found.append("there is no `retrained` model: no look inside, no R and Q")
    elif world.before is None:
        found.append("there is no model `before` unlearning: no depth (UDS)")
    return [*found, _NEVER]


def seconds_of(world: World) -> dict[str, float]:
    """How long one batch is read, one is written, and one step is trained, on the first rows: the shorter of two."""
    reader, side = world.reader, world.unlearned
    rows = side.asked[: reader.batch_size]
    longest = max(len(row.answer) for row in rows)
    prompts = [row.prompt for row in rows]

    def write() -> object:
        size = reader.batch_size
        return generate_ids(side.model, reader.tokenizer, prompts, max_new_tokens=longest, batch_size=size)

    examples = reader.tokenized(side.part, "forget", 4)
    return {
        "forward": _timed(lambda: Known.of(side.model, rows, reader.batch_size, None)),
        "write": _timed(write),
        "train": _timed(lambda: relearn(side.model, examples, lambda _: {}, steps=(1,), unchanged={})),
    }


def _timed(act: Callable[[], Any]) -> float:
    spent = []
    for _ in range(2):  # the first call may prepare things
        begin = time.perf_counter()
        act()
        spent.append(time.perf_counter() - begin)
    return min(spent)


def estimated(attack: Attack, seconds: Mapping[str, float]) -> float:
    return sum(count * seconds[unit] for unit, count in attack.cost.items())


def plan_table(attacks: Sequence[Attack], seconds: Mapping[str, float], done: Sequence[str]) -> str:
    """Each attack with its cost, model and control together, and the sum of what is still to do."""
    rows = [
        [
            one.name,
            *(one.cost[unit] for unit in UNITS),
            "done" if one.name in done else f"{estimated(one, seconds):.0f}",
        ]
        for one in attacks
    ]
    left = [one for one in attacks if one.name not in done]
    sums = [sum(one.cost[unit] for one in left) for unit in UNITS]
    rows.append(["to do", *sums, f"{sum(estimated(one, seconds) for one in left):.0f}"])
    heads = ["attack", "batches read", "batches written", "steps trained", "seconds, about"]
    return tabulate(rows, heads, disable_numparse=True, colalign=["left", *["right"] * 4])
