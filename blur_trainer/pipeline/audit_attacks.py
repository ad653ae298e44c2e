"""The attacks of an audit: what each does, what it costs, and what it found of the model and of its control."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from blur_trainer.evaluation.leakage.estimates import leak_at_k
from blur_trainer.evaluation.leakage.judges import THRESHOLDS
from blur_trainer.evaluation.leakage.leak import LeakEvaluation
from blur_trainer.evaluation.robustness.battery import quantized
from blur_trainer.evaluation.robustness.perturbed import noisy, pruned
from blur_trainer.evaluation.robustness.relearning import relearn
from blur_trainer.pipeline.audit_budget import Budget
from blur_trainer.pipeline.audit_judged import ALPHA, Scores, compared
from blur_trainer.pipeline.audit_rows import Reader, Side

BEGINNING = "Sure, here is the answer:"
_RELEARNED = 4  # rows per step


@dataclass
class World:
    """
    What is attacked, and beside what.

    Args:
        control: the retrained model on the same rows, or the model itself on rows that no model saw, or `None`.
        before: the model before unlearning.
        sets: the other sets, by role.
        plain: of the model as it is, once it was measured: the control where there is none.
    """

    reader: Reader
    budget: Budget
    seed: int
    unlearned: Side
    control: Side | None
    before: PreTrainedModel | None
    sets: Mapping[str, Dataset]
    plain: Scores | None = None

    @property
    def retrained(self) -> PreTrainedModel | None:
        return self.control.model if self.control is not None and self.control.name == "retrained" else None


@dataclass(frozen=True)
class Attack:
    """
    Args:
        name: as table and certificate name it.
        kind: `"plain"`, `"leak"`, `"relearning"`, `"bits"`, `"weights"`, `"prompt"` or `"inside"`.
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


def outside(world: World) -> list[Attack]:
    """The attacks that read what the model answers, the cheapest first."""
    budget, reader = world.budget, world.reader
    rows = len(world.unlearned.rest)
    once = _cost(world, rows)
    found = [Attack("plain question", "plain", {}, once, partial(against_control, partial(_plain, reader)))]
    for bits in (8, 4):
        read = partial(_quantized, reader, bits)
        found.append(Attack(f"{bits} bit", "bits", {"bits": bits}, once, partial(against_control, read)))
    found += _prompts(world, once)
    for share in budget.noise:
        read = partial(_noisy, reader, share, world.seed)
        found.append(Attack(f"noise {share:g}", "weights", {"share": share}, once, partial(against_control, read)))
    for share in budget.pruned:
        read = partial(_pruned, reader, share)
        found.append(Attack(f"pruned {share:g}", "weights", {"share": share}, once, partial(against_control, read)))
    found += [_relearning(world, text, rate, once) for text in _texts(world) for rate in budget.rates]
    settings = {"samples": budget.samples, "k": budget.k, "judge": "rouge", "threshold": THRESHOLDS["rouge"]}
    many = _cost(world, rows * budget.samples) | {"forward": 0}
    return [*found, Attack(f"leak@{budget.k}", "leak", settings, many, _leak)]


def _texts(world: World) -> list[str]:
    """What is relearned: a part of the forget set, and other sets."""
    return ["forget", *(role for role in ("retain", "hold") if role in world.sets)]


def _prompts(world: World, once: dict[str, int]) -> list[Attack]:
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
    return found


def _relearning(world: World, text: str, rate: float, once: dict[str, int]) -> Attack:
    steps = world.budget.steps
    settings = {"text": text, "learning_rate": rate, "steps": steps, "batch_size": _RELEARNED}
    cost = once | {"train": steps * _sides(world)}
    read = partial(_relearned, world, text, rate)
    return Attack(f"relearned {text} at {rate:g}", "relearning", settings, cost, partial(against_control, read))


def _plain(reader: Reader, side: Side) -> dict[str, list[float]]:
    return reader(side.model, side.asked)


def _quantized(reader: Reader, bits: int, side: Side) -> dict[str, Any]:
    return quantized(side.model, lambda model: reader(model, side.asked), bits=bits)  # type: ignore[return-value, arg-type]


def _noisy(reader: Reader, share: float, seed: int, side: Side) -> dict[str, Any]:
    return noisy(side.model, lambda model: reader(model, side.asked), share=share, seed=seed)  # type: ignore[return-value, arg-type]


def _pruned(reader: Reader, share: float, side: Side) -> dict[str, Any]:
    return pruned(side.model, lambda model: reader(model, side.asked), share=share)  # type: ignore[return-value, arg-type]


def _begun(reader: Reader, words: str, side: Side) -> dict[str, list[float]]:
    return reader(side.model, reader.begun(side.asked, words))


def _few_shot(reader: Reader, solved: Dataset, side: Side) -> dict[str, list[float]]:
    return reader(side.model, reader.with_examples(side.model, side.asked, solved))


def _relearned(world: World, text: str, rate: float, side: Side) -> dict[str, Any]:
    """Another part is relearned than is measured. Of rows that no model saw their own part."""
    reader = world.reader
    few = len(side.part)
    rows = side.part if text == "forget" else world.sets[text]
    points = relearn(
        side.model,
        reader.tokenized(rows, text, few),
        lambda model: reader(model, side.asked),  # type: ignore[arg-type, return-value]
        steps=(world.budget.steps,),
        learning_rate=rate,
        batch_size=_RELEARNED,
        seed=world.seed,
        unchanged={},
    )
    return points[-1]["metrics"]


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


def _leak(world: World) -> dict[str, Any]:
    """leak@k of each row. Without a control: against what the greedy answer leaks."""
    k, more = world.budget.k, {}

    def read(side: Side) -> dict[str, list[float]]:
        evaluation = LeakEvaluation(
            world.reader.tokenizer, side.rest, samples=world.budget.samples, max_rows=None,
            max_new_tokens=min(world.budget.new_tokens, max(len(row.answer) for row in side.asked)),
            max_length=world.reader.max_length, qa_template=world.reader.template, seed=world.seed, alpha=ALPHA,
            progress=False,
        )  # fmt: skip
        more[side.name] = evaluation(side.model)
        return {"leak": [leak_at_k(one["samples"], one["leaks"], k) for one in evaluation.details]}

    ours = read(world.unlearned)
    if world.control is not None:
        control: Scores | None = read(world.control)
    else:
        greedy = world.plain["rouge"] if world.plain is not None else []
        control = {"leak": [float(value >= THRESHOLDS["rouge"]) for value in greedy]}
    same = world.control is None or world.control.name == "retrained"
    return entry(ours, control, same, world.seed) | {"more": more}


def _sides(world: World) -> int:
    return 1 if world.control is None else 2


def _cost(world: World, rows: int) -> dict[str, int]:
    batches = math.ceil(rows / world.reader.batch_size) * _sides(world)
    return {"forward": batches, "write": batches, "train": 0}


def _mean(scores: Scores) -> dict[str, float]:
    return {name: float(np.mean(numbers)) for name, numbers in scores.items()}
