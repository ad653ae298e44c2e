"""Attacks on a model that is said to have forgotten one's own data: do the answers come back?"""

from collections.abc import Mapping
from typing import Any

from blur_trainer.checks import check_value
from blur_trainer.evaluation.robustness.battery import robustness
from blur_trainer.pipeline.measure import Sets
from blur_trainer.pipeline.quiet import quiet
from blur_trainer.report.results import Results
from blur_trainer.scripts.attacks import relearning_sets


def attack(sets: Sets, steps: int = 20, learning_rate: float = 1e-5, seed: int = 0) -> Results:
    """
    Relearning of a tenth of the forget set, and of as many retain rows beside it, and weights of 8 and 4 bits.

    Args:
        sets: model and sets of [`measure`]. With a retrained model it relearns too: what comes back no faster than it
            learns was not hidden.
        steps, learning_rate: of the relearning.
        seed: of the draw of its rows.

    Raises:
        `ValueError` or `TypeError`: a number is out of its range; no model was loaded.

    Returns:
        `Results`, whose `robustness` has all rows.
    """
    check_value("steps", steps, (int,), "[1, inf)")
    check_value("learning_rate", learning_rate, (float,), "(0, inf)")
    check_value("seed", seed, (int,), "[0, 4294967295]")
    with quiet():
        return _attacked(sets, steps, learning_rate, seed)


def _attacked(sets: Sets, steps: int, learning_rate: float, seed: int) -> Results:
    script, load = sets.script, sets.load
    evaluation = sets.evaluation()
    results = Results("Your own data, attacked", evaluation, samples=0)
    results.add("unlearned", "unlearned", load(sets.model))
    args = sets.args
    args.seed, args.max_length = seed, script.max_length or 512
    chosen = {role: reading.dataset for role, reading in sets.readings.items() if role in ("forget", "retain")}
    rows: Mapping[str, Any] = {f"{role} set": dataset for role, dataset in chosen.items()}
    found = robustness(
        load(sets.model, to_train=True),
        evaluation,
        relearning=relearning_sets(rows, sets.tokenizer, args),
        steps=(steps,),
        learning_rate=learning_rate,
        retrained=load(script.retrained, to_train=True) if script.retrained else None,
    )
    results.add_robustness(found)
    return results
