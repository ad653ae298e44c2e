"""The attacks of an audit: what each does, what it costs, and what it found of the model and of its control."""

from functools import partial
from typing import Any

from blur_trainer.evaluation.leakage.estimates import leak_at_k
from blur_trainer.evaluation.leakage.judges import THRESHOLDS
from blur_trainer.evaluation.leakage.leak import LeakEvaluation
from blur_trainer.evaluation.robustness.battery import quantized
from blur_trainer.evaluation.robustness.perturbed import noisy, pruned
from blur_trainer.evaluation.robustness.quantization import Bits
from blur_trainer.evaluation.robustness.relearning import relearn
from blur_trainer.pipeline.audit_judged import ALPHA, Scores
from blur_trainer.pipeline.audit_prompts import prompted, searched
from blur_trainer.pipeline.audit_rows import Reader, Side
from blur_trainer.pipeline.audit_world import Attack, World, against_control, cost_of, entry, sides

_RELEARNED = 4  # rows per step
_RANK = 8  # of LoRA
_BITS: dict[str, Bits] = {"8 bit": 8, "4 bit": 4, "NF4": "nf4"}


def outside(world: World) -> list[Attack]:
    """The attacks that read what the model answers, the cheapest first."""
    budget, reader = world.budget, world.reader
    rows = len(world.unlearned.rest)
    once = cost_of(world, rows)
    found = [Attack("plain question", "plain", {}, once, partial(against_control, partial(_plain, reader)))]
    for name, bits in _BITS.items():
        read = partial(_quantized, reader, bits)
        found.append(Attack(name, "bits", {"bits": bits}, once, partial(against_control, read)))
    found += [*prompted(world, once), *searched(world, once)]
    for share in budget.noise:
        read = partial(_noisy, reader, share, world.seed)
        found.append(Attack(f"noise {share:g}", "weights", {"share": share}, once, partial(against_control, read)))
    for share in budget.pruned:
        read = partial(_pruned, reader, share)
        found.append(Attack(f"pruned {share:g}", "weights", {"share": share}, once, partial(against_control, read)))
    found += [_relearning(world, text, rate, once) for text in _texts(world) for rate in budget.rates]
    found += [_relearning(world, "forget", rate, once, _RANK) for rate in budget.lora_rates]
    settings = {"samples": budget.samples, "k": budget.k, "judge": "rouge", "threshold": THRESHOLDS["rouge"]}
    many = cost_of(world, rows * budget.samples) | {"forward": 0}
    return [*found, Attack(f"leak@{budget.k}", "leak", settings, many, _leak)]


def _texts(world: World) -> list[str]:
    """What is relearned: a part of the forget set, and other sets."""
    return ["forget", *(role for role in ("retain", "hold") if role in world.sets)]


def _relearning(world: World, text: str, rate: float, once: dict[str, int], rank: int | None = None) -> Attack:
    steps = world.budget.steps
    settings = {"text": text, "learning_rate": rate, "steps": steps, "batch_size": _RELEARNED}
    settings |= {} if rank is None else {"rank": rank}
    cost = once | {"train": steps * sides(world)}
    read = partial(_relearned, world, text, rate, rank)
    by = "" if rank is None else " by LoRA"
    return Attack(f"relearned {text}{by} at {rate:g}", "relearning", settings, cost, partial(against_control, read))


def _plain(reader: Reader, side: Side) -> dict[str, list[float]]:
    return reader(side.model, side.asked)


def _quantized(reader: Reader, bits: Bits, side: Side) -> dict[str, Any]:
    return quantized(side.model, lambda model: reader(model, side.asked), bits=bits)  # type: ignore[return-value, arg-type]


def _noisy(reader: Reader, share: float, seed: int, side: Side) -> dict[str, Any]:
    return noisy(side.model, lambda model: reader(model, side.asked), share=share, seed=seed)  # type: ignore[return-value, arg-type]


def _pruned(reader: Reader, share: float, side: Side) -> dict[str, Any]:
    return pruned(side.model, lambda model: reader(model, side.asked), share=share)  # type: ignore[return-value, arg-type]


def _relearned(world: World, text: str, rate: float, rank: int | None, side: Side) -> dict[str, Any]:
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
        rank=rank,
        unchanged={},
    )
    return points[-1]["metrics"]


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
