"""Where RMU steers: at whole answers, or at their own words alone, where a model that never saw them misses no more."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from blur_trainer.constants import ROLES
from blur_trainer.evaluation.own_share import OwnShare, own_shares
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.scripts.methods import changed

#: own words alone are steered where they carry this share of what answers with exchanged words cost, with the rarest
#: other words up to one of these shares of an answer, the first that does (docs/evidence.md). Where they are more than
#: half of the tokens, other rows do not show how the answers go
OWN_SHARE, LEAST, MOST = 2 / 3, (0.2, 0.3, 0.4), 0.5
#: where less is steered, less strength does: so much of what whole answers take
_STRENGTH = 0.5
_OBJECTIVE = "forget_objective_kwargs"
_PLACES = {"answers_only", "own_words"}


def is_open(settings: Mapping[str, Any], layered: bool) -> bool:
    """Whether it is still to be decided: the method steers a layer, and nothing says where."""
    return layered and _OBJECTIVE in settings and not _PLACES & set(settings[_OBJECTIVE])


def steered(settings: Mapping[str, Any], shares: Mapping[float, OwnShare]) -> dict[str, Any]:
    """
    What is to be set of an objective, of the level and of BLUR's strength.

    Where own words alone are steered, an answer can be drawn back from beyond the level: the rest of it stays.

    Args:
        settings: derived, with arguments of the forget objective.
        shares: of own words, see [`own_shares`].
    """
    given = settings[_OBJECTIVE]
    for least, share in shares.items():
        if share.loss >= OWN_SHARE and share.tokens <= MOST:
            strength = {"gamma": _STRENGTH * settings["gamma"]} if "gamma" in settings else {}
            return {_OBJECTIVE: {**given, "own_words": least}, "level_two_sided": True, **strength}
    return {_OBJECTIVE: {**given, "answers_only": True}}


def with_steering(prepared: Prepared, model: Any) -> Prepared:
    """The run with what was still to be decided. `model`: before unlearning."""
    if not is_open(prepared.settings, prepared.method.layered):
        return prepared
    args, (forget, retain) = prepared.args, (prepared.sets[role].dataset for role in ROLES)
    how = {"max_length": args.max_length, "qa_template": args.qa_template}
    shares = own_shares(model, forget, retain, prepared.tokenizer, least=LEAST, **how)
    found = steered(prepared.settings, shares)
    found = {name: value for name, value in found.items() if name not in prepared.options}
    own = found[_OBJECTIVE].get("own_words")
    if shares:
        where = "whole answers: own words" if own is None else "only the own words of answers: they"
        share = shares[LEAST[-1] if own is None else own]
        said = (
            f"are {share.tokens:.2f} of the tokens and carry {share.loss:.2f} of what answers with exchanged words cost"
        )
        PartialState().print(f"Steering {where} {said}.", file=sys.stderr)
    return replace(prepared, args=changed(args, **found), settings={**prepared.settings, **found})
