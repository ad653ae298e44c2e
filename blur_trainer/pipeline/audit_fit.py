"""Cuts a budget until its attacks fit into its time, as a short timing of this model on this machine estimates it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from blur_trainer.pipeline.audit_budget import Budget
from blur_trainer.pipeline.audit_plan import estimated
from blur_trainer.pipeline.audit_world import Attack, World

#: what is halved, in turns, and never below this
FLOORS = {
    "samples": 4,
    "rows": 8,
    "beams": 2,
    "steps": 5,
    "probe_epochs": 1,
    "probe_rows": 16,
    "probe_layers": 1,
    "new_tokens": 16,
}
#: of which the lowest or the least is left out, in turns, until one is left
SETS = ("rates", "lora_rates", "noise", "pruned")
#: nothing was cut
WHOLE: dict[str, Any] = {"budget": {}, "not_tried": [], "seconds": None}


def fit(
    limits: Budget,
    world_of: Callable[[Budget], World],
    seconds: Mapping[str, float],
    battery: Callable[[World], Sequence[Attack]],
) -> dict[str, Any]:
    """
    What must be cut so that the sum of the estimates is within `limits.seconds`.

    The smallest budget may still be too large: then attacks are left out, the costliest first, but never the plain
    question.

    Args:
        world_of: the rows of a budget.
        seconds: of a batch that is read or written, and of a step, under `limits`.
        battery: the attacks of a world.

    Returns:
        `budget`, the fields that changed; `not_tried`, names of attacks; `seconds`, the estimate before.
    """
    longest = _longest(world_of(limits))

    def estimates(budget: Budget) -> dict[str, float]:
        world = world_of(budget)
        each = {**seconds, "write": seconds["write"] * _longest(world) / longest}
        return {attack.name: estimated(attack, each) for attack in battery(world)}

    whole = found = estimates(limits)
    if sum(whole.values()) <= limits.seconds:
        return WHOLE
    budget = limits
    for budget in smaller(limits):
        found = estimates(budget)
        if sum(found.values()) <= limits.seconds:
            break
    dropped = []
    for name, _ in sorted(found.items(), key=lambda item: -item[1]):
        if sum(found.values()) > limits.seconds and name != "plain question":
            dropped.append(name)
            del found[name]
    was, now = limits.said(), budget.said()
    changed = {name: value for name, value in now.items() if was[name] != value}
    return {"budget": changed, "not_tried": dropped, "seconds": round(sum(whole.values()))}


def smaller(budget: Budget) -> Iterator[Budget]:
    """Ever smaller budgets, down to the smallest."""
    before = None
    while before != budget:
        before = budget
        for name in (*FLOORS, *SETS):
            value = getattr(budget, name)
            cut = value[1:] or value if name in SETS else max(value // 2, min(value, FLOORS[name]))
            if cut != value:
                budget = replace(budget, **{name: cut})
                budget = replace(budget, k=min(budget.k, budget.samples))
                yield budget


def cut_budget(limits: Budget, cut: Mapping[str, Any]) -> Budget:
    """The budget of an audit, from what its certificate says was cut."""
    changed: dict[str, Any] = dict(cut["budget"])
    changed |= {name: tuple(value) for name, value in changed.items() if isinstance(value, list)}
    return replace(limits, **changed)


def is_cut(cut: Mapping[str, Any] | None) -> bool:
    return cut is not None and bool(cut["budget"] or cut["not_tried"])


def cuts_said(limits: Budget, cut: Mapping[str, Any]) -> list[str]:
    """For the list of what was left out."""
    if not is_cut(cut):
        return []
    was = limits.said()
    changed = ", ".join(f"{name} {was[name]} -> {value}" for name, value in cut["budget"].items())
    found = f"all of `{limits.name}` would take about {cut['seconds']} seconds here, and {limits.seconds} are allowed: "
    found += changed
    return [found, *(f"not tried, for want of time: {name}" for name in cut["not_tried"])]


def _longest(world: World) -> int:
    return max(len(row.answer) for row in world.unlearned.asked)
