"""Where RMU steers: at whole answers, or at their own words alone, where a model that never saw them misses no more."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from blur_trainer.evaluation.own_share import own_share
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.scripts.methods import changed

#: own words alone are steered from this share on of what answers with exchanged words cost (docs/evidence.md)
OWN_SHARE = 2 / 3
_OBJECTIVE = "forget_objective_kwargs"
_PLACES = {"answers_only", "own_words"}


def is_open(settings: Mapping[str, Any], layered: bool) -> bool:
    """Whether it is still to be decided: the method steers a layer, and nothing says where."""
    return layered and _OBJECTIVE in settings and not _PLACES & set(settings[_OBJECTIVE])


def steered(settings: Mapping[str, Any], share: float | None) -> dict[str, Any]:
    """
    What is to be set of an objective, and of the level.

    Where own words alone are steered, an answer can be drawn back from beyond the level: the rest of it stays.

    Args:
        settings: with arguments of the forget objective.
        share: of the own words, see [`own_share`].
    """
    if share is None or share < OWN_SHARE:
        return {_OBJECTIVE: {**settings[_OBJECTIVE], "answers_only": True}}
    return {_OBJECTIVE: {**settings[_OBJECTIVE], "own_words": True}, "level_two_sided": True}


def with_steering(prepared: Prepared, model: Any) -> Prepared:
    """The run with what was still to be decided. `model`: before unlearning."""
    if not is_open(prepared.settings, prepared.method.layered):
        return prepared
    args, sets = prepared.args, prepared.sets
    how = {"max_length": args.max_length, "qa_template": args.qa_template}
    share = own_share(model, sets["forget"].dataset, sets["retain"].dataset, prepared.tokenizer, **how)
    found = steered(prepared.settings, share)
    found = {name: value for name, value in found.items() if name not in prepared.options}
    if share is not None:
        own = "own_words" in found[_OBJECTIVE]
        where = "only the own words of answers: they carry" if own else "whole answers: own words carry"
        PartialState().print(
            f"Steering {where} {share:.2f} of what answers with exchanged words cost.", file=sys.stderr
        )
    return replace(prepared, args=changed(args, **found), settings={**prepared.settings, **found})
