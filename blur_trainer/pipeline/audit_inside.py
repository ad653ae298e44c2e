"""The look inside, as an audit judges it: probes and unlearning depth, where there is a retrained model."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from blur_trainer.evaluation.inside.patching import unlearning_depth
from blur_trainer.evaluation.inside.probes import probe_layers
from blur_trainer.models.layers import find_layers
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.pipeline.audit_judged import compared
from blur_trainer.pipeline.audit_world import Attack, World

#: by how much the depth may be below the retrained model's own, which is 1: independent trainings differ
DEPTH_TOLERANCE = 0.25
#: below so many weights a probe needs the greater rate
_SMALL, _RATES = 100_000_000, (3e-3, 5e-5)


def inside(world: World) -> list[Attack]:
    """Probes with a retrained model and a retain set; the depth with a retrained model and the one before."""
    budget, model, found = world.budget, world.unlearned.model, []
    if world.retrained is None or isinstance(model, LogitDifferenceModel):  # whose logits are combined, not its layers
        return []
    layers = len(find_layers(model)[2])
    batch = world.reader.batch_size
    rows = -(-len(world.unlearned.rest) // batch)
    if "retain" in world.sets:
        chosen = _spread(layers, budget.probe_layers)
        rate = _RATES[0] if sum(p.numel() for p in model.parameters()) < _SMALL else _RATES[1]
        settings = {"layers": chosen, "learning_rate": rate, "max_epochs": budget.probe_epochs}
        pairs = -(-min(budget.probe_rows, len(world.sets["retain"])) // batch)
        models = 2 if world.before is None else 3
        each = len(chosen) * models
        cost = {"forward": each * (pairs + rows), "write": 0, "train": each * pairs * budget.probe_epochs}
        found.append(Attack("probes", "inside", settings, cost, partial(_probes, settings)))
    if world.before is not None:
        cost = {"forward": rows * (3 + 2 * layers), "write": 0, "train": 0}
        settings = {"tolerance": DEPTH_TOLERANCE}
        found.append(Attack("depth", "inside", settings, cost, _depth))
    return found


def _spread(layers: int, most: int) -> list[int]:
    """At most so many layers at equal distances, the first and the last among them."""
    return sorted({int(layer) for layer in np.linspace(0, layers - 1, min(layers, most)).round()})


def _probes(settings: dict[str, Any], world: World) -> dict[str, Any]:
    reader = world.reader
    found = probe_layers(
        world.unlearned.model,
        reader.tokenizer,
        train=reader.tokenized(world.sets["retain"], "retain", world.budget.probe_rows),
        forget=reader.tokenized(world.unlearned.rest, "forget"),
        retrained=world.retrained,
        target=world.before,
        batch_size=reader.batch_size,
        seed=world.seed,
        progress=False,
        **settings,
    )
    known = found.knowing or []
    numbers = {"largest_gap": max(found.gaps or [0.0]), "knowing_layers": float(len(known))}
    return {
        "numbers": numbers, "control": {"largest_gap": 0.0, "knowing_layers": 0.0}, "compared": {},
        "recovered": bool(known), "inside": {"probes": asdict(found)},
    }  # fmt: skip


def _depth(world: World) -> dict[str, Any]:
    before, retrained = world.before, world.retrained
    if before is None or retrained is None:
        raise ValueError("The depth needs the model before unlearning and the retrained one.")
    rows = world.reader.tokenized(world.unlearned.rest, "forget")
    size = world.reader.batch_size
    found = unlearning_depth(before, world.unlearned.model, retrained, rows, batch_size=size, progress=False)
    known = [score for score in found.scores if score is not None]
    entry: dict[str, Any] = {
        "numbers": {"depth": found.score} if known else {}, "control": {"depth": 1.0}, "compared": {},
        "recovered": None, "inside": {"depth": asdict(found)},
    }  # fmt: skip
    if not known:
        return entry | {"why": "the retrained model's states cost no row anything in any layer"}
    lacking = [1 - score for score in known]
    how = compared(lacking, [0.0] * len(lacking), paired=True, seed=world.seed, tolerance=DEPTH_TOLERANCE)
    return entry | {"compared": {"1 - depth": how.said()}, "recovered": how.above}
